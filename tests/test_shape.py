"""The shape of the code: a lesson in front, an engine behind it, and few doors between them."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen3", "qwen3_moe", "deepseek_v3")

# The doors: what each file of the lesson may import from the engine, and why; "*" is the module itself. Nothing else is
# imported from there, and in no other way.
DOORS = {
    "layers": {"yarn": {"yarn"}},  # stretched rotary embedding
    "generate": {
        "requests": {"check_request", "check_cache", "check_finite"},  # refuses what cannot be done
        "batch": {"generate_batch"},  # the same loop for several prompts, offered by name
        "compiled": {"CompiledStep"},  # the decode step by torch.compile, offered by name
        "drafts": {"check_drafting"},  # refuses speculative decoding where it cannot be
    },
    "speculative": {"requests": {"check_finite"}},
    "tokenizer": {  # formats of other families, fine-tunes and older files
        "chat_formats": {"ASSISTANT", "BOS", "END_THINK", "EOS", "FORMATS", "IM_END", "IM_START", "THINK", "USER",
                         "Format", "Special", "check_messages", "find_ends", "find_format", "last_question", "render",
                         "split_reasoning"},
        "templates": {"choose_format"},
        "vocabulary": {"open_vocabulary", "take_apart", "with_words"},
    },
    "config": {  # the refusals
        "supported": {"read_supported"},
    },
    "weights": {
        "prepare": {"read_checkpoint", "prepare", "check_plain"},  # swaps parts for faster or smaller ones
        "sizes": {"bytes_in_memory", "check_memory", "free_memory"},  # passed on to other programs
    },
    "main": {  # device, memory, the terminal
        "terminal": {"*", "note", "progress"},
        "arguments": {"Parser", "find_checkpoint", "find_question"},
        "batch_file": {"answer_file"},  # a file of prompts
        "conversation": {"Conversation", "chat", "chat_format"},
        "prepare": {"read_checkpoint"},
        "expert_picture": {"Routing"},
        "drafts": {"check_drafting"},
    },
}
# What a file of the lesson may import of the others: data flows one way, main -> generate -> model -> layers.
KNOWS = {
    "config": set(),
    "yarn": {"config"},
    "layers": {"config", "yarn"},
    "moe": {"config", "layers"},
    "mla": {"config", "layers", "yarn"},
    "model": {"config", "layers", "moe", "mla"},
    "generate": {"layers", "model", "speculative"},  # ids, never text
    "speculative": {"layers", "model", "generate"},
    "tokenizer": {"config"},
    "weights": {"config", "layers", "moe", "model"},
    "main": {"config", "layers", "model", "generate", "speculative", "tokenizer", "weights"},
}
# The story of the lesson: these files know no special case of a device, a type, a compiler or a terminal.
STORY = ("model", "layers", "moe", "mla", "yarn", "generate", "speculative")
SPECIAL_CASES = {
    "a device": r"\.type\b|\bis_(cuda|cpu|mps)\b|\b(cuda|mps)\b",
    "a type": r"float8|\bFP8\b",
    "a compiler": r"is_compiling|torch\.compile\b|\b_dynamo\b",
    "progress": r"\bprogress\b",
}
# … and in what is compared (or matched) with something, these.
COMPARED = {"a device": r"(.*\.)?device", "a type": r"(.*\.)?(dtype|itemsize)|torch\.(b?float\d*|half)"}
# Non-blank lines of the lesson. "About" in the design: 5 % more is allowed.
SIZES = {"qwen3": 900, "qwen3_moe": 1050, "deepseek_v3": 1350}
UNTIL_LOGITS = 300  # qwen3's model.py and layers.py: every line that logits need


def lesson(package: str) -> dict[str, str]:
    """Module name -> source of the package's flat files."""
    paths = sorted((ROOT / package).glob("*.py"))
    return {path.stem: path.read_text("utf-8") for path in paths if path.stem != "__init__"}


def non_blank(source: str) -> int:
    return sum(1 for line in source.splitlines() if line.strip())


def imports(source: str, package: str) -> list[tuple[str, str]]:
    """What a flat file imports of its own package, anywhere in it: ("engine.x", name) or ("layers", name)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] != package:
                continue
            module = module if node.level else module.partition(".")[2]
            for name in [alias.name for alias in node.names]:
                is_module = module in ("", "engine")  # from . import x, from .engine import x
                found.append((f"{module}.{name}".lstrip("."), "*") if is_module else (module, name))
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found += [(rest, "*") for top, _, rest in names if top == package]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.append((ast.unparse(node.args[0]), "imported by its name as text"))
    return found


def beside_the_doors(module: str, source: str, package: str) -> list[str]:
    """Imports of a lesson file that the tables DOORS and KNOWS do not have."""
    wrong = []
    for target, name in imports(source, package):
        if target.startswith("engine."):
            allowed = name in DOORS.get(module, {}).get(target.removeprefix("engine."), ())
        else:
            allowed = target in KNOWS.get(module, ())
        if not allowed:
            wrong.append(f"{module}: {target} {name}")
    return wrong


def special_cases(source: str) -> set[str]:
    """Which special cases stand in the code; comments and docstrings may speak of them."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    code = ast.unparse(tree)
    found = {what for what, pattern in SPECIAL_CASES.items() if re.search(pattern, code)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Compare, ast.Match)):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.subject]
            parts = [part for side in compared for part in getattr(side, "elts", [side])]
            found |= {what for what, pattern in COMPARED.items() for part in parts
                      if re.fullmatch(pattern, ast.unparse(part))}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reading_order_names_every_file_of_the_lesson(package):
    order = importlib.import_module(package).READING_ORDER
    assert set(order) == set(lesson(package)) and len(set(order)) == len(order)
    shared = [name for name in importlib.import_module("qwen3").READING_ORDER if name in order]
    assert [name for name in order if name in shared] == shared, "one order in all packages"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_readme_has_the_same_reading_order(package):
    """The one table with numbers: `| 1 | `model.py` | … |`."""
    order = importlib.import_module(package).READING_ORDER
    rows = re.findall(r"^\| (\d+) \| `(\w+)\.py` \|", (ROOT / package / "README.md").read_text("utf-8"), re.M)
    assert rows == [(str(number), name) for number, name in enumerate(order, start=1)]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_carry_no_numbers(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not re.match(r"\s*\d+\w?\s*[.:)]", ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""), path


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lesson_enters_the_engine_by_its_doors_only(package):
    wrong = [line for module, source in lesson(package).items() for line in beside_the_doors(module, source, package)]
    assert wrong == []


def test_every_door_is_used():
    used = {(module, *found) for package in PACKAGES for module, source in lesson(package).items()
            for found in imports(source, package)}
    for module, doors in DOORS.items():
        for target, names in doors.items():
            assert names == {name for one, found, name in used if (one, found) == (module, f"engine.{target}")}, target


@pytest.mark.parametrize("package", PACKAGES)
def test_the_story_has_no_special_cases(package):
    found = {module: special_cases(source) for module, source in lesson(package).items() if module in STORY}
    assert found and not any(found.values()), found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lesson_is_short(package):
    sizes = {module: non_blank(source) for module, source in lesson(package).items()}
    assert sum(sizes.values()) <= 1.05 * SIZES[package], sizes
    if package == "qwen3":
        assert sizes["model"] + sizes["layers"] <= UNTIL_LOGITS, sizes


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_longer_than_one_sitting(package):
    long = {path.name: count for path in (ROOT / package).rglob("*.py")
            if (count := len(path.read_text("utf-8").splitlines())) > 300}
    assert long == {}


def test_no_line_is_wider_than_a_screen():
    folders = [*PACKAGES, "scripts", "tests"]
    wide = [f"{path.relative_to(ROOT)}:{number}" for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))
            for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if len(line) > 120]
    assert wide == []


@pytest.mark.parametrize("source,wrong", [
    ("from .engine.yarn import yarn", []),
    ("from .engine.yarn import mscale", ["layers: engine.yarn mscale"]),
    ("from .engine.fast import speed_up", ["layers: engine.fast speed_up"]),
    ("from .engine import fast", ["layers: engine.fast *"]),
    ("from qwen3.engine.fast import speed_up", ["layers: engine.fast speed_up"]),
    ("import qwen3.engine.fast", ["layers: engine.fast *"]),
    ("def f():\n    from .engine.fast import x", ["layers: engine.fast x"]),
    ("importlib.import_module('.engine.fast', 'qwen3')", ["layers: '.engine.fast' imported by its name as text"]),
    ("from .model import Model", ["layers: model Model"]),
    ("from . import generate", ["layers: generate *"]),
    ("import torch\nfrom torch import nn\nfrom .config import Config", []),
])
def test_a_way_round_the_doors_is_noticed(source, wrong):
    assert beside_the_doors("layers", source, "qwen3") == wrong


@pytest.mark.parametrize("line,what", [
    ("y = x if x.device.type == 'cpu' else z", "a device"),
    ("if x.is_cuda: y = 1", "a device"),
    ("if x.device != y.device: y = 1", "a device"),
    ("if {x.device, y.device} != {z}: y = 1", "a device"),
    ("torch.cuda.synchronize()", "a device"),
    ("if device == 'mps': y = 1", "a device"),
    ("if x.dtype == torch.bfloat16: y = 1", "a type"),
    ("if x.dtype in HALF: y = 1", "a type"),
    ("if dtype is torch.float32: y = 1", "a type"),
    ("if given != torch.half and given != torch.float16: y = 1", "a type"),
    ("if x.itemsize == 2: y = 1", "a type"),
    ("match x.dtype:\n    case _: pass", "a type"),
    ("w = w.to(torch.float8_e4m3fn)", "a type"),
    ("if torch.compiler.is_compiling(): y = 1", "a compiler"),
    ("f = torch.compile(f)", "a compiler"),
    ("def f(x, progress=None): pass", "progress"),
    ("progress(1, 2)", "progress"),
])
def test_a_special_case_is_noticed(line, what):
    assert special_cases(line) == {what}


def test_words_in_comments_and_docstrings_are_no_special_cases():
    harmless = """'''On cuda, progress.'''
def f(x):
    '''float8, if x.dtype == 1'''
    # is_compiling
    return x.to(x.dtype)
"""
    assert special_cases(harmless) == set()
    assert special_cases("y = x.to(dtype=torch.float32)") == set()
    assert special_cases("if torch.rand((), device=x.device) < y: z = 1") == set()
