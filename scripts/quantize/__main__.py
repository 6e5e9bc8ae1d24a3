"""Round a checkpoint to four or eight bits: python -m scripts.quantize NAME.

Reads a release in bfloat16, float16, float32 or FP8, matrix by matrix, and writes a folder that this project and
transformers (with compressed-tensors) read. The matrices of attention, MLPs and experts become integers, each to its
nearest, with the scale of a group searched for the least error (engine/rounding.py). Norms, routers and the embedding
stay as they are, and so does the head without --head. After an interruption, run it again: it goes on.
"""

import argparse
import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "checkpoints"
MODEL_TYPES = {"qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "qwen2_moe": "qwen3_moe"}  # all others: deepseek_v3
SHARD = 2**29  # bytes of a file at most, unless one tensor is larger: so much is held in memory
MARK = "quantize.json"  # what was asked for, in the folder that is written: only such a folder is gone on with
COPIED = ("generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
          "added_tokens.json", "chat_template*", "tiktoken.model", "*.py", "LICENSE*")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.quantize", allow_abbrev=False,
                                     description="Round a checkpoint to four or eight bits.")
    parser.add_argument("model", metavar="NAME_OR_FOLDER", help="a folder, or a name under checkpoints/")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="default 4; 8 has one scale for a row")
    parser.add_argument("--group", type=int, default=32, metavar="N",
                        help="columns that share a scale in four bits: 32 (the default), 64, 128 or 256 are fast")
    parser.add_argument("--head", action="store_true", help="round the output head too")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                        help="default: checkpoints/NAME-int4 or -int8")
    return parser.parse_args(words)


def find_source(name: str) -> tuple[Path, str]:
    """(The folder of a checkpoint, the package that reads it)."""
    folder = next((path for path in (Path(name), CHECKPOINTS / name) if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{name[:80]}: neither a folder nor a name under checkpoints/")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint's folder has one")
    try:
        kind = json.loads(path.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError):
        kind = None
    return folder.resolve(), MODEL_TYPES.get(kind, "deepseek_v3") if isinstance(kind, str) else "qwen3"


class Quantizer:
    """One checkpoint on its way from `source` to `output`."""

    def __init__(self, source: Path, package: str, output: Path, bits: int, group: int, head: bool):
        part = lambda name: import_module(f"{package}.engine.{name}")  # noqa: E731
        self.prepare, self.rounding, self.quantized = part("prepare"), part("rounding"), part("quantized")
        self.source, self.output, self.bits, self.group, self.head = source, output, bits, group, head
        self.progress = part("terminal").progress("rounding tensor")
        self.config, self.files = self.prepare.read_checkpoint(source, every=1)
        self.scales = [name for name in self.files.tensors if name.endswith("_scale_inv")]
        if self.config.quantization not in (None, "fp8"):
            raise ValueError(f"{source}: its weights are integers already ({self.config.quantization})")
        if head and self.config.tie_word_embeddings:  # from here on a matrix of its own
            self.files.tensors["lm_head.weight"] = self.files.tensors["model.embed_tokens.weight"]

    def is_rounded(self, name: str) -> bool:
        shape, unit = self.files.tensors[name].shape, self.group if self.bits == 4 else 1
        if ".experts." in name and self.config.moe_intermediate_size % unit:
            return False  # transformers reads all experts of a layer in one format
        is_head = self.head and name == "lm_head.weight" and shape[1] % unit == 0
        return is_head or self.rounding.is_rounded(name, shape, unit)

    def sizes(self) -> dict[str, int]:
        """Name of a source tensor -> the bytes that are written for it."""
        sizes = {}
        for name, tensor in self.files.tensors.items():
            count = tensor.size // tensor.dtype.itemsize
            if self.is_rounded(name):
                scales = tensor.shape[0] * (tensor.shape[1] // self.group if self.bits == 4 else 1)
                sizes[name] = count * self.bits // 8 + 2 * scales + 16
            elif name not in self.scales:
                sizes[name] = count * (2 if tensor.dtype == self.quantized.FP8 else tensor.dtype.itemsize)
        return sizes

    def shards(self) -> list[list[str]]:
        """The source's tensors, in the order in which they lie there, in files of some size."""
        tensors, shards, total = self.files.tensors, [], SHARD
        for name, size in sorted(self.sizes().items(), key=lambda item: (*tensors[item[0]][::3], item[0])):
            if total + size > SHARD:
                shards.append([])
                total = 0
            shards[-1].append(name)
            total += size
        return shards

    def written(self, name: str) -> dict:
        """What is stored for a tensor of the source."""
        tensor = self.files.read(name)
        if tensor.dtype == self.quantized.FP8:
            tensor = self.expanded(name, tensor)
        if not self.is_rounded(name):
            return {name: tensor.bfloat16() if name in self.fp8 else tensor}
        packed = self.rounding.packed_tensors(tensor, self.bits, self.group)
        return {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in packed.items()}

    @property
    def fp8(self) -> set[str]:
        return {name.removesuffix("_scale_inv") for name in self.scales}

    def expanded(self, name: str, weight):
        """FP8 times its scales, in float32."""
        scale = self.files.read(f"{name}_scale_inv")
        shape = tuple(weight.shape)
        block = self.quantized.block_of(shape, tuple(scale.shape), self.config.weight_block_size)
        if block is None:
            raise ValueError(f"{self.source}: {name}_scale_inv fits no {shape}")
        scale = scale.view(self.quantized.grid_of(shape, block))
        return self.quantized.dequantize(weight, scale, self.quantized.torch.float32, block)

    def run(self) -> None:
        """Write what is not written yet, file by file; config.json comes last, and makes it a checkpoint."""
        from safetensors.torch import save_file

        shards, done, weight_map = self.shards(), 0, {}
        count = sum(map(len, shards))
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        for file, shard in zip(names, shards):
            path = self.output / file
            if not path.is_file():  # or it was written before an interruption
                tensors = {}
                for name in shard:
                    tensors |= {key: tensor.contiguous() for key, tensor in self.written(name).items()}
                    done += 1
                    self.progress(done, count)
                part = path.with_name(f"{file}.part")
                save_file(tensors, part, metadata={"format": "pt"})
                os.replace(part, path)
            done = sum(len(shard) for shard in shards[:names.index(file) + 1])
            self.progress(done, count)
            weight_map |= dict.fromkeys(self.prepare.read_header(path), file)
        if len(shards) > 1:
            total = sum(path.stat().st_size for path in self.output.glob("*.safetensors"))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write(self.output / "model.safetensors.index.json", index)
        for pattern in COPIED:
            for path in self.source.glob(pattern):
                shutil.copyfile(path, self.output / path.name)
        write(self.output / "config.json", self.new_config())  # last: now it is a checkpoint

    def new_config(self) -> dict:
        """The source's config.json with the quantization_config of compressed-tensors, which names what stays."""
        config = json.loads((self.source / "config.json").read_text("utf-8"))
        config["tie_word_embeddings"] = self.config.tie_word_embeddings and not self.head
        if "num_nextn_predict_layers" in config:  # a draft layer that is not as it should be was left out
            config["num_nextn_predict_layers"] = self.config.num_nextn_predict_layers
        matrices = {name.removesuffix(".weight") for name, tensor in self.files.tensors.items()
                    if len(tensor.shape) == 2 and name.endswith(".weight") and not self.is_rounded(name)}
        matrices -= {"model.embed_tokens"}
        known = {"lm_head": "lm_head", "re:.*[.]mlp[.]gate$": ".mlp.gate",
                 "re:.*[.]shared_expert_gate$": ".shared_expert_gate"}
        ignore = [pattern for pattern, end in known.items() if any(name.endswith(end) for name in matrices)]
        ignore += sorted(name for name in matrices if not name.endswith(tuple(known.values())))
        if self.config.tie_word_embeddings and not self.head:
            ignore.append("lm_head")
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None,
                   "strategy": "group" if self.bits == 4 else "channel",
                   "group_size": self.group if self.bits == 4 else None, "block_structure": None,
                   "observer": "minmax", "observer_kwargs": {}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "kv_cache_scheme": None, "global_compression_ratio": None, "ignore": ignore, "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}}}
        return config


def write(path: Path, values: dict) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    os.replace(part, path)


def begin(output: Path, asked: dict) -> bool:
    """Whether something is left to do in the folder; ValueError for a folder of something else."""
    mark = output / MARK
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            found = json.loads(mark.read_text("utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{output}: is there, and not from this program; choose another with -o") from None
        if found != asked:
            raise ValueError(f"{output}: was begun from another checkpoint or with other flags; choose another with -o "
                             "or delete it")
        return not (output / "config.json").is_file()
    output.mkdir(parents=True, exist_ok=True)
    write(mark, asked)
    return True


def run(arguments: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for what cannot be read, rounded or written."""
    if arguments.group < 8 or arguments.group % 8:
        raise ValueError(f"--group {arguments.group}: expected a multiple of 8")
    source, package = find_source(arguments.model)
    output = arguments.output or CHECKPOINTS / f"{source.name}-int{arguments.bits}"
    if output.resolve() == source or source in output.resolve().parents:
        raise ValueError(f"{output}: lies in the folder that is read; choose another with -o")
    quantizer = Quantizer(source, package, output, arguments.bits, arguments.group, arguments.head)
    before = {path.name: path.stat().st_size for path in sorted(source.glob("*.safetensors"))}
    asked = {"source": str(source), "files": before, "bits": arguments.bits, "head": arguments.head,
             "group": arguments.group if arguments.bits == 4 else None}
    if begin(output, asked):
        quantizer.run()
    gigabytes = import_module(f"{package}.engine.memory").gigabytes
    after = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output}: {gigabytes(after)}, made from {gigabytes(sum(before.values()))}; "
          f"run it with: uv run python -m {package}.main -m {output}")


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or arguments.output or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run it again and it goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
