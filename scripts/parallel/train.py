"""Train a checkpoint on several GPUs, each with some rows of every batch: a loop of your own to start from.

    uv run torchrun --nproc-per-node 2 -m scripts.parallel.train qwen3                  each holds the whole model (DDP)
    uv run torchrun --nproc-per-node 2 -m scripts.parallel.train qwen3 --how fsdp       each holds a share of it (FSDP2)
    uv run python -m scripts.parallel.train qwen3                                       one process, the same losses

    ddp     all have all weights, compute the gradients of their own rows, and average them: one sum for each backward
    fsdp    each keeps a part of every weight; a layer is gathered as it is needed and dropped again, its gradient is
            averaged and dealt out, so that weights, gradients and optimizer states take 1/N of the memory
"""

import argparse
import importlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}


def spread(model, how: str, device):
    """The model as a function (ids, targets) -> loss whose gradients are averaged over all processes."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    class Loss(torch.nn.Module):
        """One module that is called once a step: DDP and FSDP act when it is entered and left."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, targets):
            return F.cross_entropy(self.model(ids).float().flatten(0, 1), targets.flatten())

    loss = Loss().train()
    if not dist.is_initialized():
        return loss
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers[:model.config.num_hidden_layers]:  # a draft layer is entered by other doors
        fully_shard(layer, mesh=mesh)
    return fully_shard(loss, mesh=mesh)


def train(model, ids, how: str = "ddp", steps: int = 20, rows: int = 8, length: int = 64, rate: float = 3e-4,
          device="cpu"):
    """`steps` steps on random pieces of `ids`; yields the loss of each, the mean over all processes."""
    import torch
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rows % world or len(ids) <= length:
        raise ValueError(f"{world} processes cannot share {rows} rows evenly" if rows % world else
                         f"the text has {len(ids)} tokens, and a row takes {length + 1}")
    loss_of = spread(model.to(device), how, torch.device(device))
    optimizer = torch.optim.AdamW([weight for weight in loss_of.parameters() if weight.requires_grad], lr=rate)
    chance = torch.Generator().manual_seed(0)  # the same on all: they draw the same batch, and each takes its rows
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (rows,), generator=chance)
        batch = torch.stack([ids[start:start + length + 1] for start in starts])[rank::world].to(device)
        loss = loss_of(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        yield float(mean)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.parallel.train", description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=TINY)
    parser.add_argument("-m", "--model", metavar="FOLDER", help="a checkpoint; default the embedded one")
    parser.add_argument("--text", metavar="FILE", default=ROOT / "scripts/train/words/glossary.txt", help="to learn")
    parser.add_argument("--how", choices=("ddp", "fsdp"), default="ddp", help="whole models, or shares of one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the weights there, as safetensors")
    arguments = parser.parse_args()
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    folder = arguments.model or ROOT / "checkpoints" / TINY[arguments.package]
    weights, tokenizer = (importlib.import_module(f"{arguments.package}.{name}") for name in ("weights", "tokenizer"))
    try:
        model = weights.load_model(folder, dtype="float32", engine=False)  # the lesson's code, which can be trained
        ids = torch.tensor(tokenizer.Tokenizer.from_checkpoint(folder).encode(Path(arguments.text).read_text("utf-8")))
        for step, loss in enumerate(train(model, ids, arguments.how, arguments.steps, device=device), start=1):
            if first:
                print(f"step {step}  loss {loss:.4f}", flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # All take part, and the first gets all of it.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if arguments.output and first:
        from safetensors.torch import save_file

        own = {name: state[name].contiguous() for name, _ in model.named_parameters()}  # a tied head once
        save_file(own, arguments.output, metadata={"format": "pt"})
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
