"""One model on several ranks: the numbers and tokens of one process, and every share of every checkpoint."""

import ast
import contextlib
import inspect
import json
import math
import re
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests import packed
from tests.packages import PACKAGES, module, stack_on_the_cpu, without_compiler
from tests.ranks import run_on
from tests.seeded import CASES, LONG_PROMPT, PROMPT, seeded_tensor, shapes_of, write_case, write_checkpoint

HERE = Path(__file__).parent
# Few for every day: uneven heads, one key head, a tied and an untied head, shared experts, drafts.
FEW = {"qwen3": ["one_key_head_untied", "all_key_heads"], "qwen3_moe": ["shared_expert"],
       "deepseek_v3": ["yarn", "half_split"]}
TOLERANCE = {1: 0, 2: 1e-5, 3: 1e-5, 4: 2e-5}


def run(package: str, folder: str, dtype: str | None = None) -> dict:
    """What a checkpoint computes on this rank; or why it does not, if the ranks cannot share it."""
    weights, generate = module(package, "weights"), module(package, "generate")
    processes = module(package, "engine.processes")
    processes.share_models(dist.group.WORLD)
    try:
        model = weights.load_model(folder, dtype=dtype)
    except ValueError as error:
        return {"refused": str(error)}
    sums, real = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **more: sums.append(tensor.dtype) or real(tensor, **more)
    with torch.inference_mode():
        whole = model(torch.tensor([LONG_PROMPT]))[0].float()
    dist.all_reduce = real

    def answer(**settings) -> list[int]:
        return list(generate.generate(model, PROMPT, max_new_tokens=8, **settings))

    seeded, chance = dict(temperature=1.0, top_p=0.9, seed=3), dict(temperature=1.0, top_p=0.9)
    found = {"logits": whole, "sums": sums, "layers": len(model.model.layers), "greedy": answer(),
             "seeded": answer(**seeded), "by chance": answer(**chance, repetition_penalty=1.1),
             "batch": generate.generate_batch(model, [PROMPT, PROMPT[:3]], max_new_tokens=5),
             "refilled by chance": refilled(package, model, {}, seeded | {"repetition_penalty": 1.3}, chance),
             "bytes": sum(weight.nbytes for weight in model.parameters()),
             "counted": weights.bytes_in_memory(folder, dtype),
             "cached": sum(tensor.nbytes for tensor in generate.new_cache(model, 1).tensors),
             "counted cache": module(package, "engine.sizes").cache_bytes_per_token(model.config, whole.dtype),
             "types": Counter(weight.dtype for weight in model.parameters())}
    found["refilled"] = found["refilled by chance"][:2]  # what is greedy or has a seed
    if getattr(model.config, "num_nextn_predict_layers", 0):
        found["layers"] -= 1  # the draft layer, which the logits do not need
        found["drafted"] = answer(**seeded, speculative=True)
        found["drafted by chance"] = answer(**chance, speculative=True)
    return found


def refilled(package: str, model: torch.nn.Module, *ways: dict) -> list[tuple[int, list[int]]]:
    """A prompt for each of these settings, two at a time: (which, its tokens) in the order in which they end."""
    continuous = module(package, "engine.continuous")
    every = [continuous.Request(PROMPT[:6 - number], 2 + number, way, number) for number, way in enumerate(ways)]
    return [(row.request.index, row.ids) for _, ended in continuous.continuous_batch(
        model, every, rows=2, capacity=12) for row in ended]


def run_all(checkpoints: list[tuple]) -> list[dict]:
    return [run(*one) for one in checkpoints]


def compare(ranks: int, checkpoints: list[tuple]) -> int:
    """How many checkpoints ran on so many ranks, all as on one."""
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(run_on, 1, run_all, checkpoints)
        every = run_on(ranks, run_all, checkpoints)
    (alone,) = one.result()
    ran = 0
    for checkpoint, one, *others in zip(checkpoints, alone, *every, strict=True):
        first = others[0]
        if "refused" in first:
            assert all(other == first and "processes cannot share" in other["refused"] for other in others)
            continue
        ran += 1
        assert sum(other["bytes"] for other in others) >= one["bytes"] > max(other["bytes"] for other in others)
        assert one["sums"] == []
        for other in others:
            error = (other["logits"] - one["logits"]).abs().max() / one["logits"].abs().max()
            assert error <= TOLERANCE[ranks], checkpoint
            assert torch.equal(other["logits"], first["logits"])
            assert other["sums"] == [torch.float32] * (2 * one["layers"] + 2)  # two a layer, embedding, head
            assert other["bytes"] == other["counted"] and other["cached"] == other["counted cache"]
            assert other["types"] == one["types"]
            for what in ("greedy", "seeded", "batch", "refilled", "drafted"):
                assert other.get(what) == one.get(what), (checkpoint, what)
            for what in ("by chance", "refilled by chance", "drafted by chance"):
                assert other.get(what) == first.get(what), (checkpoint, what)
    return ran


def cases(folder: Path, packages, names=CASES) -> list[tuple[str, str]]:
    return [(package, str(write_case(folder / package / name, package, name)))
            for package in packages for name in names[package]]


def fp8(folder: Path, packages) -> list[tuple[str, str]]:
    """In blocks of 128: with three in a row that two ranks share unevenly, and with one, of which one has nothing."""
    made = []
    for package in packages:
        fp8_checkpoint = import_module(f"tests.{package}.test_weights").fp8_checkpoint
        made += [(package, str(fp8_checkpoint(folder / f"{package}-{F}", 200, F, "float32"))) for F in (300, 120)]
    return made


def write_packed(folder: Path, package: str, releases) -> list[tuple[str, str]]:
    """In words of four or eight bits: two ranks share 96 columns as 32 and 64, and the 32 of an expert as 0 and 32."""
    return [(package, str(packed.write(folder / f"{package}, {release}", package, release, head=True)))
            for release in releases]


@pytest.mark.ahead
def test_two_ranks_compute_what_one_process_does(tmp_path):
    some = cases(tmp_path, PACKAGES, FEW) + fp8(tmp_path, ["qwen3"])
    assert compare(2, some + write_packed(tmp_path, "qwen3", ["gptq, desc_act"])) == 8


@pytest.mark.slow
@pytest.mark.ahead
def test_two_ranks_share_weights_of_four_and_eight_bits(tmp_path):
    """The head is packed too; and one is expanded once."""
    some = {"qwen3": ["awq", "awq, whole columns", "gptq", "gptq v2", "gptq, 8 bits, whole columns",
                      "compressed, 8 bits", "compressed, act order"],
            "qwen3_moe": ["awq", "gptq, 8 bits, desc_act"], "deepseek_v3": ["gptq", "compressed, zero points"]}
    checkpoints = [one for package in some for one in write_packed(tmp_path, package, some[package])]
    assert compare(2, checkpoints + [(*checkpoints[-1], "float32")]) == 12


def random_checkpoint(folder: Path, package: str, number: int) -> Path:
    """Sizes and switches that nobody chose."""
    chance = torch.Generator().manual_seed(number)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=chance))]

    K, G = one_of(1, 2, 4), one_of(1, 2, 3)
    changes = dict(vocab_size=one_of(131, 137, 150), hidden_size=one_of(24, 36, 50), num_hidden_layers=one_of(1, 2, 4),
                   intermediate_size=one_of(9, 31, 64), tie_word_embeddings=one_of(True, False))
    if package == "deepseek_v3":
        changes |= dict(num_attention_heads=4 * G, num_key_value_heads=4 * G, v_head_dim=one_of(6, 14),
                        moe_intermediate_size=one_of(8, 17), q_lora_rank=one_of(None, 11),
                        n_shared_experts=one_of(1, 2), first_k_dense_replace=one_of(0, 1))
    else:
        changes |= dict(num_attention_heads=4 * G, num_key_value_heads=K, head_dim=one_of(6, 12))
    if package == "qwen3_moe":
        changes |= dict(moe_intermediate_size=one_of(8, 17), num_experts=one_of(4, 7, 12))
    seeded = import_module("tests.seeded")
    return write_checkpoint(folder, getattr(seeded, f"{package}_config")(**changes))


# For three and four ranks: heads that they can share, more ranks than key heads, 5 and 9 and 13 experts, and refusals.
SOME = {"qwen3": ["one_key_head_untied", "all_key_heads", "two_values_per_head"],
        "qwen3_moe": ["all_experts", "dense_first"], "deepseek_v3": ["three_groups", "kimi"]}


@pytest.mark.slow
@pytest.mark.ahead
@pytest.mark.parametrize("ranks, names, more, least", [(2, CASES, 1, 41), (3, SOME, 1, 12), (4, SOME, 1, 7)])
def test_so_do_more_ranks_on_more_cases_and_on_checkpoints_that_nobody_chose(tmp_path, ranks, names, more, least):
    """Refused are fewer heads than ranks, and heads that so many cannot share. FP8 stays FP8, or is expanded once."""
    checkpoints = cases(tmp_path, PACKAGES, names) + fp8(tmp_path, PACKAGES if ranks == 2 else ["deepseek_v3"])
    checkpoints += [(*checkpoints[-1], "float32")]
    checkpoints += [(package, str(random_checkpoint(tmp_path / f"{package}{number}", package, number)))
                    for package in PACKAGES for number in range(more)]
    assert compare(ranks, checkpoints) >= least


def run_stacked(checkpoints: list[tuple], compiled: str) -> list[list]:
    """(Tokens of plain steps, tokens of compiled ones, graphs) with stacked experts, as on a GPU."""
    found = []
    for package, folder, *dtype in checkpoints:
        with pytest.MonkeyPatch.context() as patch:
            if package != "qwen3":
                stack_on_the_cpu(patch, package, one_kernel=compiled == "grouped")
            if compiled != "compiled":
                without_compiler(patch, package)
            patch.setattr(module(package, "engine.compiled"), "BLOCK", 10)
            torch._dynamo.utils.counters.clear()
            module(package, "engine.processes").share_models(dist.group.WORLD)
            model, generate = module(package, "weights").load_model(folder), module(package, "generate")
            found.append([list(generate.generate(model, PROMPT, max_new_tokens=16, compiled=step))
                          for step in (False, True)] + [torch._dynamo.utils.counters["stats"]["unique_graphs"]])
    return found


@pytest.mark.slow
@pytest.mark.ahead
def test_experts_in_stacks_are_shared_too(tmp_path):
    """By the grouped matmuls of a GPU, and by the decode step that is compiled there, run as it stands."""
    checkpoints = cases(tmp_path, PACKAGES, {"qwen3": ["grouped"], "qwen3_moe": ["two_of_eight"],
                                             "deepseek_v3": ["moonlight"]})
    alone, *ranks = run_on(1, run_stacked, checkpoints, "grouped") + run_on(2, run_stacked, checkpoints, "grouped")
    assert ranks == [alone] * 2 and all(plain == step for plain, step, _ in alone)


@pytest.mark.slow
@pytest.mark.ahead
def test_a_compiled_step_holds_the_sums(tmp_path):
    """Without a break: as many graphs as in one process (tests/test_compiled.py). FP8 experts in stacks."""
    checkpoints = cases(tmp_path, ["qwen3"], {"qwen3": ["grouped"]}) + [
        (package, str(import_module(f"tests.{package}.test_weights").fp8_checkpoint(
            tmp_path / package, 256, 256, "float32"))) for package in ("qwen3_moe", "deepseek_v3")]
    first, second = run_on(2, run_stacked, checkpoints, "compiled")
    assert first == second
    for (plain, compiled, graphs), most in zip(first, (1, 1, 3), strict=True):
        assert plain == compiled and 0 < graphs <= most


# In one process

@pytest.mark.parametrize("package", PACKAGES)
def test_in_one_process_nothing_is_swapped_and_nothing_sent(tmp_path, monkeypatch, package):
    for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object", "init_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("sent"))
    generate, parallel = module(package, "generate"), module(package, "engine.parallel")
    model = module(package, "weights").load_model(write_case(tmp_path, package, FEW[package][0]))
    assert len(list(generate.generate(model, PROMPT, max_new_tokens=3, temperature=1.0))) == 3
    parts = {type(part) for part in model.modules()}
    assert not any(part.__module__ == parallel.__name__ or "Parallel" in part.__name__ for part in parts)
    assert not model.lm_head._forward_hooks and all(weight.requires_grad for name, weight in model.named_parameters()
                                                    if not name.endswith("_bias"))
    assert not hasattr(generate.sample, "by_itself")
    processes = module(package, "engine.processes")
    assert processes.on_first(lambda: 7) == 7 and processes.ranks() == 1 and processes.leave(2) == 2
    assert parallel.on_first_rank(max)(3, 4) == 4


def code_of(forward) -> str:
    """Without types, and without the sums."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    return re.sub(r"summed\((self\.\w+\(.*\))\)", r"\1", ast.unparse(tree.body[0].body))


@pytest.mark.parametrize("package", PACKAGES)
def test_but_for_two_sums_the_layer_is_the_lessons(package):
    shared, lesson = module(package, "engine.parallel").ParallelLayer.forward, module(package, "model").Layer.forward
    assert code_of(shared) == code_of(lesson) and inspect.getsource(shared).count("summed(") == 2


def test_a_shared_model_is_not_trained_and_says_so():
    summed = module("qwen3", "engine.parallel").summed
    with pytest.raises(ValueError, match="shared among several processes cannot be trained"):
        summed(torch.ones(2, requires_grad=True))


# Where, and does it fit?

class Group:
    """Stands for a process group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.fixture
def one_of(monkeypatch):
    """one_of(package, rank, ranks, local_rank, on_this_machine): be that one."""
    def be(package: str, rank: int, ranks: int, local: int, here: int):
        processes = module(package, "engine.processes")
        monkeypatch.setattr(processes, "GROUP", Group(rank, ranks))
        for name, value in {"RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}.items():
            monkeypatch.setenv(name, str(value))
        return processes
    return be


def test_each_process_has_a_gpu_of_its_own(monkeypatch, one_of):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    processes = one_of("qwen3", 6, 8, 2, 4)
    assert processes.device_of(None) == processes.device_of("cuda") == "cuda:2" and chosen == ["cuda:2"] * 2
    assert processes.device_of("cpu") == "cpu"
    for name in ("cuda:1", "mps", "nonsense"):
        with pytest.raises(ValueError, match="is one device, and there are 8 processes; leave it out"):
            processes.device_of(name)
    processes = one_of("qwen3", 6, 8, 6, 8)
    with pytest.raises(ValueError, match="8 processes on this machine have 4 GPUs; start one for each, or give -d cpu"):
        processes.device_of(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device_of(None) == "cpu" and processes.device_of("cuda") == "cuda"  # which is then refused


@pytest.mark.parametrize("package", PACKAGES)
def test_memory_is_that_of_a_gpu_or_of_all_on_a_machine(tmp_path, monkeypatch, one_of, package):
    folder, sizes = write_case(tmp_path, package, FEW[package][0]), module(package, "engine.sizes")
    whole, free = sizes.bytes_in_memory(folder, "bfloat16"), []  # on the CPU too nothing stays in the file then
    monkeypatch.setattr(sizes, "free_memory", lambda device: free[-1])
    shares = []
    for rank in range(2):
        one_of(package, rank, 2, rank, 2)
        shares.append(sizes.bytes_in_memory(folder, "bfloat16"))
    assert max(shares) < 0.7 * whole and whole <= sum(shares)
    for device, needed in (("cuda", shares[1] + 1000), ("cpu", sum(shares) + 2000)):
        for left, fits in ((needed, True), (needed - 1, False)):
            free.append(left)
            with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="weights and .* for the cache"):
                said = sizes.check_memory(folder, torch.device(device), "bfloat16", 7, 1000)
                assert said == module(package, "engine.memory").gigabytes(shares[1])


@pytest.mark.parametrize("package", PACKAGES)
def test_fp8_is_expanded_where_the_shares_of_all_on_a_machine_fit(tmp_path, monkeypatch, one_of, package):
    folder, sizes = fp8(tmp_path, [package])[0][1], module(package, "engine.sizes")
    free, said, answers = [], [], []
    monkeypatch.setattr(sizes, "free_memory", lambda device: free[-1])
    monkeypatch.setattr(sizes, "of_all", lambda yes: said.append(yes) or [answers[-1]])
    shares = []
    for rank in range(2):
        one_of(package, rank, 2, rank, 2)
        shares.append(sizes.bytes_in_memory(folder, "float32"))
    room = math.ceil((sum(shares) + 2000) * 10 / 9)
    for left, answer in ((room, True), (room, False), (room - 2, False)):  # another machine may say no
        free.append(left)
        answers.append(answer)
        dtype, why = sizes.keep_or_expand(folder, torch.device("cpu"), None, 1000)
        assert said[-1] == (left == room) and dtype == ("float32" if answer else None)
        assert answer or module(package, "engine.memory").gigabytes(shares[1]) in why


# Shares

def published() -> list[tuple[str, str, dict]]:
    every = [(package, name, entry["config"]) for package in PACKAGES
             for name, entry in json.loads((HERE / package / "published_configs.json").read_text()).items()]
    others = json.loads((HERE / "other_configs.json").read_text())
    every += [(package, name, others[name].get("config", others[name])) for package, name in (
        ("qwen3_moe", "Qwen/Qwen3-235B-A22B-FP8"), ("qwen3_moe", "Qwen/Qwen3-30B-A3B-FP8"),
        ("deepseek_v3", "zai-org/GLM-4.7-Flash"))]
    alike = {str((shapes_of(whole(entry)), entry.get("quantization_config"))): (package, name, entry)
             for package, name, entry in reversed(every)}
    return list(alike.values())


def whole(entry: dict) -> dict:
    """Two layers and one expert of a config, in which all fields stand."""
    config = {"mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False,
              "num_nextn_predict_layers": 0, "first_k_dense_replace": 1} | entry | {"num_hidden_layers": 2}
    one = {name: 1 for name in ("num_experts", "n_routed_experts") if config.get(name)}
    return config | one | {"num_nextn_predict_layers": min(config["num_nextn_predict_layers"], 1)}


def as_stored(package: str, entry: dict) -> SimpleNamespace:
    """Names, shapes and types of a checkpoint's files; of all layers and experts that are alike one."""
    info = module(package, "engine.safetensors_reader").TensorInfo
    tensors, quantised = {}, entry.get("quantization_config") is not None
    for name, shape in shapes_of(whole(entry)).items():
        is_fp8 = quantised and name.endswith("_proj.weight") and "eh_proj" not in name
        tensors[name] = info(Path("x"), shape, torch.float8_e4m3fn if is_fp8 else torch.bfloat16, 0, 0)
        if is_fp8:
            grid = tuple(math.ceil(size / 128) for size in shape)
            tensors[f"{name}_scale_inv"] = info(Path("x"), grid, torch.float32, 0, 0)
    return SimpleNamespace(tensors=tensors, directory=Path("x"))


def config_of(entry: dict) -> SimpleNamespace:
    """The fields that shares are made by."""
    quantization = "fp8" if entry.get("quantization_config") else None
    return SimpleNamespace(**{"head_dim": 0, "qk_nope_head_dim": 0, "weight_block_size": (128, 128),
                              "quantization": quantization} | entry)


@pytest.mark.parametrize("package, name, entry", published(), ids=lambda value: value if isinstance(value, str) else "")
def test_shares_of_published_checkpoints_cover_each_tensor_once(package, name, entry):
    files, config, allowed = as_stored(package, entry), config_of(entry), []
    Shares, Place = module(package, "engine.shares").Shares, module(package, "engine.parallel").Place
    alone = Shares(config, files, Place(0, 1))
    assert all(alone.count(name) == math.prod(tensor.shape) for name, tensor in files.tensors.items())
    for ranks in (*range(2, 10), 12, 16, 32, 64):
        try:
            every = [Shares(config, files, Place(number, ranks)) for number in range(ranks)]
            cuts = {tensor: [share.of(tensor) for share in every] for tensor in files.tensors}
        except ValueError as error:
            assert is_refusal(str(error)), error
            continue
        allowed.append(ranks)
        for tensor, parts in cuts.items():
            kind, shape = tensor.split(".")[-2], files.tensors[tensor].shape
            axis = int(kind in ("o_proj", "down_proj"))
            assert {part.size for part in parts} == {(*shape, 1)[parts[0].axis]}
            if kind in ("k_proj", "v_proj") and ranks > config.num_key_value_heads:
                times = ranks // config.num_key_value_heads
                assert all(part == parts[at // times * times] for at, part in enumerate(parts))
                parts = parts[::times]
            cut = kind.endswith("_proj") or kind in ("embed_tokens", "lm_head")
            if cut and not kind.endswith("a_proj") and kind != "eh_proj":
                edges = [0, *(part.end for part in parts)]
                assert [part.first for part in parts] == edges[:-1] and edges[-1] == shape[axis]
                assert {part.axis for part in parts} == {axis}
            else:
                assert {(part.first, part.end) for part in parts} == {(0, (*shape, 1)[0])}
            if scale := cuts.get(f"{tensor}_scale_inv"):
                assert all(part.first == own.first // 128 and part.end == math.ceil(own.end / 128)
                           and (part.first < part.end) == (own.first < own.end)
                           for part, own in zip(scale, cuts[tensor]))
                assert all(edge % 128 == 0 or edge == shape[axis] for part in cuts[tensor] for edge in part[1:3])
    assert set(allowed) >= {2, 4} and (len(allowed) >= 5 or "Flash" in name), allowed


def is_refusal(text: str) -> bool:
    return len(text) < 300 and text.startswith(tuple("123456789")) and (
        " processes cannot share " in text or " processes would cut " in text)


@pytest.mark.parametrize("package, name, allowed", [
    ("qwen3", "Qwen3-32B", {*range(1, 9), 16, 24, 32, 40, 48, 56, 64}),
    ("qwen3_moe", "Qwen3-235B-A22B", {1, 2, 3, 4, *range(8, 65, 4)}),
    ("deepseek_v3", "DeepSeek-V3", {1, 2, 4, 8, 16, 32, 64})])
def test_so_many_ranks_can_share_it(package, name, allowed):
    entry = json.loads((HERE / package / "published_configs.json").read_text())[name]["config"]
    files, config = as_stored(package, entry), config_of(entry)
    Shares, Place = module(package, "engine.shares").Shares, module(package, "engine.parallel").Place
    found = set()
    for ranks in range(1, 65):
        try:
            for tensor in files.tensors:
                Shares(config, files, Place(0, ranks)).of(tensor)
            found.add(ranks)
        except ValueError:
            pass
    assert found == allowed


@pytest.mark.parametrize("package, release", [("qwen3", release) for release in packed.RELEASES] + [
    ("deepseek_v3", "awq"), ("qwen3_moe", "compressed, zero points")])
def test_shares_of_packed_weights_are_shares_of_the_matrix(tmp_path, package, release):
    """Of every rank: what it makes of its rows or columns of each tensor are those of W, and all are there once."""
    prepare, Shares = module(package, "engine.prepare"), module(package, "engine.shares").Shares
    config, files = prepare.read_checkpoint(packed.write(tmp_path, package, release, only="layers.1", head=True))
    alone, *ranks = (Shares(config, files, module(package, "engine.parallel").Place(*place))
                     for place in ((0, 1), (0, 2), (1, 2)))
    words = {name.rpartition(".")[0]: name for name in files.tensors if name.endswith(("qweight", "weight_packed"))}
    for linear, name in words.items():
        shape, axis = alone.shape(linear), int(linear.endswith(("o_proj", "down_proj")))
        format = next(each for each in prepare.FORMATS if each.layout(files, linear, shape, config))

        def part_of(shares, shape) -> torch.nn.Module:
            tensors = {leaf: shares.cut(f"{linear}.{leaf}", files.read(f"{linear}.{leaf}"))
                       for leaf in alone.layout(linear)}
            assert all(tensor.numel() == shares.count(f"{linear}.{leaf}") for leaf, tensor in tensors.items())
            part = format.make(config, shape, **tensors)
            assert shares.count_weights(name) == math.prod(shape)
            assert torch.equal(part(torch.eye(shape[1])).T, W := part.matrix(torch.float32))
            x = seeded_tensor("x", (1, shape[1]), 1.0).bfloat16()  # by PyTorch's kernel, whatever the rows are
            assert torch.allclose(part(x).float(), x.float() @ W.T, rtol=0.01, atol=0.02)
            return part

        whole, edges = part_of(alone, shape), [0]
        for shares in ranks if ranks[0].is_cut(linear) else ():
            first, end, size = shares.part(linear)
            assert size == shape[axis] and first == edges[-1]
            edges.append(end)
            own = part_of(shares, (end - first, shape[1]) if axis == 0 else (shape[0], end - first))
            assert torch.equal(own.matrix(torch.float32), whole.matrix(torch.float32).narrow(axis, first, end - first))
            out_of_order = axis == 1 and ("desc_act" in release or "act order" in release)
            assert own.packed or not whole.packed or first == end or out_of_order
        assert edges == [0] or len(edges) == 3 and edges[-1] == shape[axis]


PLAIN = lambda name, shape: ({"weight": torch.empty(shape)}, None)  # noqa: E731
BLOCKS = lambda name, shape: ({"weight": torch.empty(shape).to(torch.float8_e4m3fn), "weight_scale_inv":  # noqa: E731
                               torch.empty([math.ceil(size / 128) for size in shape])}, None)


@pytest.mark.parametrize("F, up, down, more, edges", [
    (96, packed.awq, PLAIN, {}, [0, 32, 96]),  # words of 8 rows, but the kernels want 32 columns of a down_proj
    (192, PLAIN, packed.gptq, {"group": 64}, [0, 64, 192]),
    (192, packed.gptq, packed.gptq, {"group": 64, "desc_act": True}, [0, 96, 192]),
    (96, packed.compressed, packed.compressed, {"group": 48}, [0, 0, 96]),
    (104, packed.compressed, packed.compressed, {"group": 104, "bits": 8}, [0, 64, 104]),
    (98, packed.compressed, packed.compressed, {"group": 98}, [0, 0, 98]),  # two columns alone might be of eight bits
    (300, BLOCKS, PLAIN, {}, [0, 128, 300]), (99, PLAIN, PLAIN, {}, [0, 49, 99])])
def test_what_gate_and_up_have_down_has(F, up, down, more, edges):
    """Shares are whole units of all three, however each is stored."""
    tensors = {}
    for kind, shape, store in (("gate", (F, 40), up), ("up", (F, 40), up), ("down", (40, F), down)):
        how = {} if store in (PLAIN, BLOCKS) else more | {"group": 40} if kind != "down" else more
        tensors |= {f"mlp.{kind}_proj.{leaf}": tensor for leaf, tensor in store(kind, shape, **how)[0].items()}
    quantization = {packed.awq: "awq", packed.gptq: "gptq", packed.compressed: "compressed-tensors", BLOCKS: "fp8"}
    config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=2, head_dim=8, weight_block_size=None,
                             quantization=quantization.get(up, quantization.get(down)))
    info = module("qwen3", "engine.safetensors_reader").TensorInfo
    files = SimpleNamespace(read=tensors.get, directory="x", tensors={
        name: info("x", tuple(tensor.shape), tensor.dtype, 0, 0) for name, tensor in tensors.items()})
    Shares, Place = module("qwen3", "engine.shares").Shares, module("qwen3", "engine.parallel").Place
    for rank in range(2):
        shares = Shares(config, files, Place(rank, 2))
        assert {shares.part(f"mlp.{kind}_proj") for kind in ("gate", "up", "down")} == {(*edges[rank:rank + 2], F)}


@pytest.mark.parametrize("release, head_dim, kind, within", [
    ("gptq", 8, "o_proj", "32 columns"), ("awq", 4, "k_proj", "8 rows")])
def test_heads_that_would_cut_a_group_or_a_word_are_refused(tmp_path, release, head_dim, kind, within):
    """Before loading, and with the number of processes that fit all matrices."""
    read_checkpoint, Shares = module("qwen3", "engine.prepare").read_checkpoint, module("qwen3", "engine.shares").Shares
    config, files = read_checkpoint(packed.write(
        tmp_path, "qwen3", release, num_attention_heads=8, num_key_value_heads=4, head_dim=head_dim, only=kind))
    two, four = (Shares(config, files, module("qwen3", "engine.parallel").Place(0, ranks)) for ranks in (2, 4))
    name = next(name for name in files.tensors if kind in name and name.endswith("qweight"))
    assert two.of(name).end * 2 == two.of(name).size
    with pytest.raises(ValueError) as error:
        four.of(name)
    assert str(error.value) == f"4 processes would cut {kind} within {within} that share a scale or a word; start 2"
    assert is_refusal(str(error.value))


def test_several_processes_round_nothing_in_memory(tmp_path, one_of):
    weights, folder = module("qwen3", "weights"), write_case(tmp_path, "qwen3", "grouped")
    one_of("qwen3", 0, 2, 0, 2)
    for ask in (weights.bytes_in_memory, weights.load_model):
        with pytest.raises(ValueError, match="--dtype int8 rounds whole matrices, of which 2 processes have shares; "):
            ask(folder, dtype="int8")


def test_processes_of_a_machine_share_what_packed_experts_may_take(tmp_path, monkeypatch, one_of):
    prepare = module("qwen3_moe", "engine.prepare")
    model = module("qwen3_moe", "weights").load_model(packed.write(tmp_path, "qwen3_moe", "awq", only="experts"))
    monkeypatch.setattr(prepare, "free_memory", lambda device: 24_000)
    one_of("qwen3_moe", 1, 4, 1, 2)
    prepare.bound_experts(model, torch.device("cpu"))
    assert {part.budget.most for part in model.modules() if getattr(part, "budget", None)} == {9_000}


def test_columns_of_all_groups_on_every_process_are_said_to_be_slow(tmp_path, one_of):
    read_checkpoint = module("qwen3", "engine.prepare").read_checkpoint
    for release in ("gptq", "gptq, desc_act"):
        folder = packed.write(tmp_path / release, "qwen3", release, only="down_proj")
        for ranks in (1, 2):
            one_of("qwen3", 0, ranks, 0, ranks)
            said = "each process has columns of all groups" in " ".join(read_checkpoint(folder)[0].notes)
            assert said == ("desc_act" in release and ranks == 2)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_rows_of_other_ranks_are_not_read(tmp_path):
    """Of a mapped file only the pages of one's own rows come into memory."""
    config = import_module("tests.seeded").qwen3_config(hidden_size=512, intermediate_size=8192, num_hidden_layers=1,
                                                          num_attention_heads=8)
    prepare, Place = module("qwen3", "engine.prepare"), module("qwen3", "engine.parallel").Place
    config, files = prepare.read_checkpoint(write_checkpoint(tmp_path, config))
    shares = module("qwen3", "engine.shares").Shares(config, files, Place(1, 8))

    def resident() -> int:
        found = Path("/proc/self/smaps").read_text().split(f"{tmp_path.name}/model.safetensors\n")[1:]
        return sum(int(text.split("Rss:")[1].split()[0]) for text in found) * 1024

    files.read("model.norm.weight")
    before = resident()
    part = shares.cut(name := "model.layers.0.mlp.up_proj.weight", files.read(name))
    assert part.shape == (1024, 512) and part.sum().isfinite()
    assert part.nbytes <= resident() - before <= 3 * part.nbytes  # of 8: with what the system reads ahead
