"""The same idea is the same code in every package: definitions of one name must not drift apart."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("*/config.py"))]
FILES = ["config.py", "tokenizer.py", "layers.py", "attention.py", "moe.py", "model.py", "weights.py", "compiled.py", "generate.py", "main.py", "routing.py"]
# Files of the engine that are one file, byte for byte, wherever they stand.
EQUAL = [f"engine/{name}.py" for name in (
    "__init__", "architectures", "arguments", "chat_formats", "chatml_shapes", "conversation", "fields",
    "generation_fields", "memory", "quantization", "quantized", "rope_fields", "safetensors_reader", "supported",
    "template_reader", "template_shapes", "templates", "terminal", "tiktoken_vocab", "vocabulary")]
# The same between the two families of Qwen3.
EQUAL_QWEN3 = ["tokenizer.py"]
# What differs by nature, with the reason: {"file.py name": why}
MAY_DIFFER = {
    "config.py Config": "each architecture has fields of its own",
    "config.py Config.from_checkpoint": "each architecture has fields of its own",
    "config.py Config.is_sparse": "which layers have experts is said in other fields",
    "tokenizer.py Tokenizer.chat": "each family has a chat format of its own",
    "layers.py KVCache": "latents instead of keys and values",
    "attention.py attention_fused": "values may be narrower than keys",
    "moe.py Router": "a softmax in one, sigmoids, a bias and groups in the other",
    "model.py DecoderLayer.__init__": "where the experts come in",
    "model.py Decoder.__init__": "the layer that predicts a second token",
    "model.py Decoder.forward": "the layer that predicts a second token shares its inner part",
    "weights.py load_model": "experts are stacked on a GPU; a bias stays float32",
    "weights.py bytes_in_memory": "experts are counted apart",
    "weights.py count_bytes": "a bias stays float32",
    "weights.py bytes_per_token": "a token reads only its experts",
    "weights.py check_memory": "experts that nobody needs stay in the file",
    "weights.py read_checkpoint": "experts are counted, and the layer that predicts a second token may be left out",
    "compiled.py Slots": "latents instead of keys and values",
    "compiled.py clear": "latents instead of keys and values",
    "compiled.py CompiledStep.__init__": "experts must be stacked",
    "generate.py generate": "speculative",
    "main.py parse_arguments": "--show-experts, --speculative",
    "main.py run": "--show-experts",
}


def definitions(source: str, package: str) -> dict[str, str]:
    """Name -> code of each function, method and class body, without docstrings, the package's own name made neutral."""
    out, source = {}, re.sub(rf"\b{package}\b", "package", source)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
                    inner.body = inner.body[1:] or [ast.Pass()]
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
            for method in methods:
                out[f"{node.name}.{method.name}"] = ast.unparse(method)
                node.body.remove(method)
            out[node.name] = ast.unparse(node)
    return out


def test_packages_are_found():
    assert {"qwen3", "qwen3_moe"} <= set(PACKAGES)


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


@pytest.mark.parametrize("file", EQUAL)
def test_engine_files_are_equal(file):
    assert len({(ROOT / package / file).read_bytes() for package in PACKAGES if (ROOT / package / file).exists()}) == 1


@pytest.mark.parametrize("file", EQUAL_QWEN3)
def test_files_of_the_qwen3_packages_are_equal(file):
    assert (ROOT / "qwen3" / file).read_bytes() == (ROOT / "qwen3_moe" / file).read_bytes()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_engine_file_is_said_to_be_equal_or_stands_alone(package):
    own = {f"engine/{path.name}" for path in (ROOT / package / "engine").glob("*.py")} - set(EQUAL)
    others = {f"engine/{path.name}" for other in PACKAGES if other != package for path in (ROOT / other / "engine").glob("*.py")}
    assert not own & others


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_defined_twice(package):
    """A merge may leave an old function behind, and the later one counts."""
    for path in (ROOT / package).rglob("*.py"):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
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
                assert getattr(node, "level", 0) or top == package or top not in {*PACKAGES, "transformers", "jinja2", "huggingface_hub", "pickle"}, f"{path}: {name}"
        assert "torch.load" not in text and "pickle.load" not in text
