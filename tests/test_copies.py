"""The same idea is the same code in every package: definitions of one name must not drift apart."""

import ast
import difflib
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import copies
from scripts.copies import ALL, COMPARED, ELSEWHERE, EQUAL, MAY_DIFFER, OWN

ROOT = Path(__file__).parents[1]
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("*/config.py"))]
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
FILES = sorted({path.name for package in PACKAGES for path in (ROOT / package).glob("*.py")} - {"__init__.py"})


def definitions(source: str, package: str) -> dict[str, str]:
    """Name -> code of each function, method and class body, without docstrings, the package's own name made neutral."""
    out, source = {}, re.sub(rf"\b{package}\b", "package", source)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
                    inner.body = inner.body[1:] or [ast.Pass()]
            inside = node.body if isinstance(node, ast.ClassDef) else []
            methods = [inner for inner in inside if isinstance(inner, ast.FunctionDef)]
            for method in methods:
                out[f"{node.name}.{method.name}"] = ast.unparse(method)
                node.body.remove(method)
            out[node.name] = ast.unparse(node)
    return out


def test_packages_are_found():
    assert set(PACKAGES) == set(ALL)


def test_a_difference_is_noticed_and_a_docstring_is_none():
    one = definitions('def f(x: Config):\n    """a"""\n    return qwen3.g(x)', "qwen3")
    assert one == definitions('def f(x: Config):\n    """b"""\n    return qwen3_moe.g(x)', "qwen3_moe")
    assert one != definitions("def f(x: Config):\n    return qwen3_moe.g(x + 1)", "qwen3_moe")


@pytest.mark.parametrize("file", FILES)
def test_same_name_same_code(file):
    every = {package: definitions((ROOT / package / file).read_text(), package) for package in PACKAGES
             if (ROOT / package / file).exists()}
    for (one, left), (other, right) in itertools.combinations(every.items(), 2):
        for name in left.keys() & right.keys():
            whole = f"{file} {name.partition('.')[0]}"  # KVCache.write may differ where KVCache may
            if f"{file} {name}" not in MAY_DIFFER and (whole not in MAY_DIFFER or whole.startswith("config.py")):
                assert left[name] == right[name], f"{one}/{file} and {other}/{file} differ in {name}"


@pytest.mark.parametrize("group", copies.twins(), ids=lambda group: group[-1])
def test_files_are_equal_byte_for_byte(group):
    assert [path for path in group if not (ROOT / path).is_file()] == [], "missing"
    assert copies.differing(ROOT, [group]) == [], f"{' and '.join(group)} differ: uv run python -m scripts.copies"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_engine_file_is_said_to_be_equal_or_stands_alone(package):
    equal = {path for group in copies.twins() for path in group}
    for path in (ROOT / package / "engine").glob("*.py"):
        name = f"engine/{path.name}"
        others = [other for other in PACKAGES if other != package and (ROOT / other / name).exists()]
        assert f"{package}/{name}" in equal or name in OWN or not others, f"{name}: EQUAL or OWN in scripts/copies.py"


def test_no_row_of_the_tables_is_left_over():
    """What no longer differs, or is no longer there, needs no reason."""
    for key, path in ELSEWHERE.items():
        assert key[1] in EQUAL and key[0] in EQUAL[key[1]], f"ELSEWHERE: {key} -> {path}"
    for path in OWN:
        assert len({copies.content(ROOT, f"{package}/{path}") for package in PACKAGES} - {None}) > 1, f"OWN: {path}"
    for row in MAY_DIFFER:
        file, name = row.split()
        paths = [ROOT / package / file for package in PACKAGES if (ROOT / package / file).exists()]
        every = [definitions(path.read_text("utf-8"), path.parent.name) for path in paths]
        codes = {str({key: code for key, code in one.items() if f"{key}.".startswith(f"{name}.")}) for one in every}
        assert len(codes - {"{}"}) > 1, f"MAY_DIFFER: {row}"


def test_what_a_mixture_of_experts_changes_is_in_one_file():
    one, other = ((ROOT / package / "layers.py").read_text("utf-8").splitlines() for package in ("qwen3", "qwen3_moe"))
    assert list(difflib.unified_diff(one, other)) == []


@pytest.mark.parametrize("package", COMPARED)
def test_the_readme_shows_the_diff_of_the_model(package):
    is_, should_be = copies.with_diff(ROOT, package)
    assert is_ == should_be, "uv run python -m scripts.copies --readme"


def test_a_diff_is_headed_by_what_changed():
    before = "import a\n\n\nclass A:\n    def f(self):\n        a\n        b\n        c\n        d\n"
    after = before.replace("        d\n", "        D\n\n    def g(self):\n        e\n").replace("import a", "import A")
    assert copies.readable_diff(before, after, "one.py", "two.py").splitlines() == [
        "--- one.py", "+++ two.py", "@@ top of the file @@", "-import a", "+import A", "", "",
        "@@ A.f @@", "         b", "         c", "-        d", "+        D", "+", "+    def g(self):", "+        e"]
    longer = after + "\n\nclass B:\n    x = 1\n"
    assert copies.readable_diff(after, longer, "one", "two").splitlines()[2] == "@@ B @@"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small repository of two packages that share a file, with all of it committed."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    monkeypatch.setattr(copies, "EQUAL", {"layers.py": ALL[:2], "engine/yarn.py": ALL[1:]})
    monkeypatch.setattr(copies, "ELSEWHERE", {("deepseek_v3", "engine/yarn.py"): "yarn.py"})
    monkeypatch.setattr(copies, "COMPARED", {"qwen3_moe": "qwen3"})
    files = dict.fromkeys(("qwen3/layers.py", "qwen3_moe/layers.py", "qwen3_moe/engine/yarn.py", "deepseek_v3/yarn.py",
                           "qwen3/model.py"), "x = 1\n")
    files["qwen3_moe/model.py"] = "x = 2\n"
    files["qwen3_moe/README.md"] = f"# A lesson\n\n{copies.BEGIN}\n{copies.END}\n\nThe end.\n"
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*GIT, *words], cwd=tmp_path, check=True)
    return tmp_path


def refused(house, capsys, *arguments: str) -> str:
    before = {path: path.read_bytes() for path in house.glob("*/**/*.py")}
    assert copies.main(list(arguments), house) == 2
    error = capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in house.glob("*/**/*.py")}
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 300 + len(str(house))
    return error


def test_a_changed_file_is_copied_to_its_twins(house, capsys):
    assert copies.main([], house) == 0 and capsys.readouterr().out == ""
    (house / "qwen3_moe/layers.py").write_text("x = 2\n")
    (house / "deepseek_v3/yarn.py").write_text("x = 3\n")
    assert copies.main(["--check"], house) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "qwen3/layers.py, qwen3_moe/layers.py: not equal", "qwen3_moe/engine/yarn.py, deepseek_v3/yarn.py: not equal"]
    assert (house / "qwen3/layers.py").read_text() == "x = 1\n"
    assert copies.main([], house) == 0
    assert capsys.readouterr().out == ("qwen3_moe/layers.py -> qwen3/layers.py\n"
                                       "deepseek_v3/yarn.py -> qwen3_moe/engine/yarn.py\n")
    assert (house / "qwen3/layers.py").read_text() == "x = 2\n"
    assert (house / "qwen3_moe/engine/yarn.py").read_text() == "x = 3\n"
    (house / "qwen3/layers.py").unlink()
    assert copies.main([], house) == 0 and (house / "qwen3/layers.py").read_text() == "x = 2\n"


def test_two_changes_are_for_a_person_to_settle(house, capsys):
    (house / "deepseek_v3/yarn.py").write_text("x = 9\n")  # alone it could be copied, and must wait for the others
    (house / "qwen3/layers.py").write_text("x = 2\n")
    (house / "qwen3_moe/layers.py").write_text("x = 3\n")
    assert "qwen3/layers.py and qwen3_moe/layers.py were both changed" in refused(house, capsys)
    subprocess.run([*GIT, "commit", "-qam", "both"], cwd=house, check=True)
    assert "neither was changed" in refused(house, capsys)
    assert "no twins" in refused(house, capsys, str(house / "qwen3/model.py"))
    assert copies.main([str(house / "qwen3_moe/layers.py")], house) == 0
    assert (house / "qwen3/layers.py").read_text() == "x = 3\n"
    assert copies.main([str(house / "deepseek_v3/yarn.py")], house) == 0 and copies.main([], house) == 0


def test_without_git_the_right_file_is_named(house, capsys, monkeypatch):
    (house / "qwen3/layers.py").write_text("x = 2\n")
    monkeypatch.setenv("PATH", "")
    assert "git cannot say" in refused(house, capsys)
    assert copies.main([str(house / "qwen3/layers.py")], house) == 0
    assert (house / "qwen3_moe/layers.py").read_text() == "x = 2\n"


def test_the_diff_is_written_between_its_markers(house, capsys):
    assert [copies.main([flag], house) for flag in ("--check", "--readme", "--check")] == [1, 0, 0]
    text = (house / "qwen3_moe/README.md").read_text()
    diff = "--- qwen3/model.py\n+++ qwen3_moe/model.py\n@@ top of the file @@\n-x = 1\n+x = 2"
    assert text == f"# A lesson\n\n{copies.BEGIN}\n```diff\n{diff}\n```\n{copies.END}\n\nThe end.\n"
    (house / "qwen3_moe/README.md").write_text(text.replace(copies.END, ""))
    assert "expected one line" in refused(house, capsys, "--readme")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_defined_twice(package):
    """A merge may leave an old function behind, and the later one counts."""
    for path in (ROOT / package).rglob("*.py"):
        body = ast.parse(path.read_text()).body
        names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(names) == len(set(names)), path


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_stands_alone_and_is_read_in_one_sitting(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, f"{path} is too long to be read in one sitting"
        defined = [node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(set(defined)) == len(defined), f"{path} defines a name twice, as a bad merge does"
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.partition(".")[0]
                foreign = top in {*PACKAGES, "transformers", "jinja2", "huggingface_hub", "pickle"} - {package}
                assert getattr(node, "level", 0) or not foreign, f"{path}: {name}"
        assert "torch.load" not in text and "pickle.load" not in text
