"""The counter's rules on small sources, and what it counts in the packages."""

import ast

import pytest

from scripts import lines
from scripts.lines import ASKED, KINDS, NAMED, PACKAGES, ROOT, kinds


def of(source: str, file: str = "layers") -> str:
    """The first letter of each line's kind; a blank line is a dot."""
    by_line = kinds(source, file)
    return "".join(by_line.get(number, ".")[0] for number in range(1, len(source.splitlines()) + 1))


@pytest.mark.parametrize("source,expected", [
    # What no rule speaks of teaches, docstrings and comments included.
    ("def f(x):\n    \"\"\"y.\"\"\"\n\n    # why\n    return x", "tt.tt"),
    ("\"\"\"A file.\n\nA picture.\n\"\"\"\n\nx = 1", "t.tt.t"),
    # head
    ("import a\nfrom b import (c,\n               d)\n# why\nimport e", "hhhhh"),
    ("__all__ = ['a']\nA = other.A\nA, B = other.A, c\nD = 1", "hhht"),
    ("if TYPE_CHECKING:\n    import a\nif __name__ == '__main__':\n    f()", "hhhh"),
    # robustness
    ("def f(x):\n    if not x:\n        raise ValueError('a'\n                         'b')\n    return x", "trrrt"),
    ("if a:\n    raise A\nelif b:\n    raise B\nelse:\n    x = 1", "rrrrtt"),
    ("if a:\n    x = 1\nelse:\n    raise A", "tttr"),
    ("for x in y:\n    if x:\n        why = x\n        raise A(why)", "rrrr"),
    ("try:\n    x = f()\nexcept OSError as error:\n    raise A from None", "rtrr"),
    ("try:\n    x = f()\nexcept OSError:\n    x = 1", "tttt"),
    ("assert x\nwarnings.warn('a')\nfields.refuse('a')\ncheck_request(x)\n# why\ncheck_finite(y)", "rrrrrr"),
    ("def check_it(x):\n    \"\"\"y\"\"\"\n    z = x\n    if z:\n        raise A", "rrrrr"),
    # interface
    ("parser.add_argument('-a',\n  help='b')\nnote('a')\nif x:\n    print('a')\na.notes.append('b')", "iiiiii"),
    ("class A:\n    @property\n    def b(self):\n        return self.c[0].shape\n\n    @property\n    def d(self):\n"
     "        return self.c * 2", "tiii.ttt"),
    # speed and variants
    ("if x.device.type == y:\n    z = 1\nelse:\n    z = 2", "sstt"),
    ("if x.dtype == torch.half and a:\n    z = 1", "ss"),
    ("z = 1 if torch.compiler.is_compiling() else 2\nz = 1 if a else 2", "st"),
    ("if torch.rand((), device=x.device) < y:\n    z = 1", "tt"),
    ("if self.interleaved:\n    if not x:\n        raise A\n    y = 1", "vrrv"),
    ("y = f(config.rope_scaling) if config.rope_scaling else x", "v"),
])
def test_rules(source, expected):
    assert of(source) == expected


def test_what_is_named_has_its_kind_with_all_that_is_in_it():
    config = ("class Config:\n    a: int\n    notes: tuple = ()\n\n    @classmethod\n    def from_checkpoint(cls, x):\n"
              "        if not x:\n            raise A\n        return cls(x)")
    assert of(config, "config") == "tti.llrrl" and of(config, "layers") == "ttt.ttrrt"
    main = "import a\n\nB = 1\n\n\ndef run(x):\n    # why\n    y = x\n    note('a')\n\n\ndef main():\n    run(B)"
    assert of(main, "main") == "h.i..iiii..ii"


def test_every_line_that_is_not_blank_has_one_kind():
    for package in PACKAGES:
        for path in lines.lesson(package):
            source = path.read_text("utf-8")
            numbers = {number for number, line in enumerate(source.splitlines(), start=1) if line.strip()}
            by_line = kinds(source, path.stem)
            assert by_line.keys() == numbers and set(by_line.values()) <= set(KINDS)


def test_no_row_of_the_tables_is_left_over():
    sources = {path: path.read_text("utf-8") for package in PACKAGES for path in lines.lesson(package)}
    for kind, names in NAMED.items():
        assert kind in KINDS
        for row in names:
            file, _, name = row.partition(".")
            found = [ast.unparse(ast.parse(source)) for path, source in sources.items() if path.stem == file]
            last = name.rpartition(".")[2]
            assert any(f"def {last}(" in one or f"class {last}" in one or f"    {last}: " in one for one in found), row
    machine = "a device, a type or a compiler"  # to be noticed, and better not found
    for name, (kind, why) in ASKED.items():
        assert kind in KINDS and (why == machine or any(name in source for source in sources.values())), name


@pytest.mark.parametrize("package", PACKAGES)
def test_most_of_the_lesson_teaches(package):
    counts = lines.count(package)
    total = sum(counts[file][kind] for file in counts for kind in KINDS)
    assert sum(counts[file]["teach"] for file in counts) >= 0.7 * total, lines.table(package)


def test_the_command_prints_what_it_counts(capsys):
    assert lines.main([]) == 0
    printed = capsys.readouterr().out
    for package in PACKAGES:
        row = next(line for line in printed.partition(package)[2].splitlines() if line.startswith("all")).split()
        texts = [path.read_text("utf-8") for path in lines.lesson(package)]
        every = sum(bool(line.strip()) for text in texts for line in text.splitlines())
        assert int(row[-2]) == every and row[1] == str(sum(one["teach"] for one in lines.count(package).values()))
    assert lines.main(["qwen3", "--show", "head"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == sum(one["head"] for one in lines.count("qwen3").values())
    file, number, text = shown[0].split(":", 2)
    assert (ROOT / file).read_text("utf-8").splitlines()[int(number) - 1] == text[1:]
    with pytest.raises(SystemExit) as stopped:
        lines.main(["gpt2"])
    assert stopped.value.code == 2 and "'gpt2' is not a package" in capsys.readouterr().err
