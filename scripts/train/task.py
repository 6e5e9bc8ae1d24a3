"""What is trained, and on what: the plan, the task with its batches and questions, the model and its optimizers."""

import hashlib
import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qwen3.tokenizer import END_THINK  # noqa: I001  before torch: see qwen3/__init__.py

import torch

from . import checkpoint, data, lora, own_data
from .configs import KINDS, LEARNING_RATE
from .corpus import Corpus
from .faster import fuse_long_rows, pad_rows
from .together import is_first, on_this_machine
from .training import adamw, muon_and_adamw

ANSWER = 80  # tokens of an answer that is shown, at most


@dataclass(frozen=True)
class Plan:
    """What is trained and how: the command line's choices, which an unfinished training must agree with."""
    package: str
    minutes: float | None  # one of the two is given
    steps: int | None
    seed: int
    data: str | None  # a file's path
    digest: str | None  # and the hash of what stands in it
    source: str | None  # the folder of the checkpoint to start from
    lora: int | None  # rank
    rate: float | None
    tokens: int  # of one step
    compiled: bool
    threads: int
    device: str = "cpu"
    dtype: str = "bfloat16"  # of the matmuls

    @property
    def mixed(self) -> bool:
        """Are matmuls in another type than the weights?"""
        return self.dtype == "bfloat16"


def digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path and path.is_file() else None


class Task:
    """What is learned: the rows of the batches, and three questions that are asked again and again."""

    # Held-out phrasings all (words/heldout.jsonl): no training question is worded like these. (question, thinking)
    QUESTIONS = [("why cache keys and values", False), ("so what does a gating network do", False),
                 ("i need the sum 512+256", True)]

    def __init__(self, plan: Plan, folder: Path):
        self.module = lambda name: importlib.import_module(f"{plan.package}.{name}")
        self.plan, self.text, self.conversations = plan, None, None
        self.corpus = Corpus(KINDS[plan.package][0], plan.package)
        if plan.data:
            found = own_data.read_data(Path(plan.data))
            self.text, self.conversations = (found, None) if isinstance(found, str) else (None, found)
        if not (folder / "config.json").exists() and not plan.source:
            self.write_small_files(folder)
        Tokenizer = self.module("tokenizer").Tokenizer
        self.tokenizer = Tokenizer.from_checkpoint(plan.source or folder, "plain" if self.text else None)
        if not self.text and self.tokenizer.format is None:
            raise ValueError(f"{plan.source} has no chat format to write questions and answers in: it continues text; "
                             "give --data a text, or start from an instruct model")
        if plan.source and is_first():
            checkpoint.copy_small(Path(plan.source), folder)
        self.turns = None if self.text else data.Turns(self.tokenizer)
        self.lengths, self.rows = data.ROWS, partial(data.of_corpus, self.corpus, self.turns)
        if self.text:
            ids = self.tokenizer.encode(self.text)
            self.lengths, self.rows = {min(256, max(2, len(ids) - 1)): 1}, partial(own_data.of_text, ids)
        elif self.conversations:
            parts = own_data.parts_of(self.conversations, self.turns)
            longest = max(len(ids) for ids, _, _ in parts)
            Config = self.module("config").Config
            if longest > (context := Config.from_checkpoint(plan.source or folder).max_position_embeddings):
                raise ValueError(f"{plan.data}: its longest conversation has {longest} tokens, and the model a context "
                                 f"of {context}; shorten it")
            self.lengths = {max(160, longest + 1): 1}
            self.rows = partial(own_data.of_conversations, parts, self.tokenizer.bos_ids)

    def write_small_files(self, folder: Path) -> None:
        """Tokenizer and configs of a model that starts from nothing."""
        if self.text:
            texts = [self.text]
        elif self.conversations:
            texts = ["user\nassistant\n", *("\n".join([*(m["content"] for m in messages), thought or "", answer])
                                            for messages, thought, answer in self.conversations)]
        else:
            texts = data.tokenizer_texts(self.corpus)
        library = data.train_tokenizer(texts, self.plan.package, KINDS[self.plan.package][1]["vocab_size"])
        checkpoint.write_new(folder, self.plan.package, library, chat=not self.text)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, targets = data.batch(self.rows, self.plan.seed, step, self.lengths, self.plan.tokens)
        return ids.to(self.plan.device), targets.to(self.plan.device)

    def questions(self) -> list[tuple[str, bool]]:
        """(question, thinking); of a text, the beginnings of three of its lines."""
        if self.text:
            lines = [line for line in self.text.splitlines() if line.strip()] or [self.text]
            return [(" ".join(line.split()[:4]), False) for line in lines[:: max(1, len(lines) // 3)][:3]]
        if self.conversations:
            chosen = self.conversations[:: max(1, len(self.conversations) // 3)][:3]
            return [(each.messages[-1]["content"], each.thought is not None) for each in chosen]
        return self.QUESTIONS

    def answer(self, model: torch.nn.Module, question: str, thinking: bool, length: int | None = None) -> str:
        """Greedy, by the model as it now is; at most `length` tokens."""
        tokenizer = self.tokenizer
        prompt = (tokenizer.bos_ids + tokenizer.encode(question) if self.text else
                  tokenizer.chat([{"role": "user", "content": question}], thinking))
        device, _, _ = self.plan.device.partition(":")
        # A cache and no gradients would be another thing to compile.
        with torch.autocast(device, torch.bfloat16, enabled=self.plan.mixed), torch.compiler.set_stance("force_eager"):
            ids = list(self.module("generate").generate(model, prompt, max_new_tokens=length or ANSWER,
                                                        stop_ids=model.config.eos_token_id))
        return " ".join(tokenizer.decode(ids).rpartition(END_THINK)[2].split())


def make_model(plan: Plan, folder: Path) -> torch.nn.Module:
    """From nothing, or from a checkpoint: in float32 to train all of it, in its own type to train LoRA beside it."""
    module = importlib.import_module
    if not plan.source:
        model = checkpoint.new_model(folder, plan.package).to(plan.device)
    else:
        weights, dtype = module(f"{plan.package}.weights"), None if plan.lora and plan.mixed else torch.float32
        model = weights.load_model(plan.source, plan.device, dtype, engine=False)
    if plan.lora:
        lora.add_lora(model, plan.package, plan.lora)
    fuse_long_rows(model, module(f"{plan.package}.engine.parts").FusedAttention)
    pad_rows(model)
    if plan.compiled:  # not the experts: each gets another number of tokens at every step
        sparse = any(type(part).__name__ == "Experts" for part in model.modules())
        for part in model.modules():
            if type(part).__name__ in (("Attention", "RMSNorm") if sparse else ("Layer",)):
                part.compile(dynamic=True)
    return model


def check_trainable(plan: Plan) -> None:
    """ValueError for a checkpoint that cannot be trained, before its weights are read."""
    config = importlib.import_module(f"{plan.package}.config").Config.from_checkpoint(plan.source)
    if config.quantization:
        raise ValueError(f"{plan.source}: {config.quantization.upper()} weights cannot be trained here; start from the "
                         "bfloat16 release of the same model")
    with torch.device("meta"):
        model = importlib.import_module(f"{plan.package}.model").Model(config)
    parameters = sum(p.numel() for p in model.parameters())
    # Full: a float32 weight, its gradient and AdamW's two means. LoRA: the weight in its own type, or in float32.
    needed = parameters * ((2 if plan.mixed else 4) if plan.lora else 16)
    here = on_this_machine() if plan.device == "cpu" else 1
    needed *= here
    free = importlib.import_module(f"{plan.package}.weights").free_memory(torch.device(plan.device))
    if free is not None and needed > free:
        cure = "take a smaller checkpoint" if plan.lora else "--lora 8 takes an eighth of it"
        each = f" in {here} processes" if here > 1 else ""
        raise ValueError(f"{Path(plan.source).name}: training {parameters / 1e9:.1f} billion parameters{each} takes "
                         f"more than {needed / 1e9:.1f} GB, and {plan.device} has {free / 1e9:.1f} GB free; {cure}")


def optimizers_of(plan: Plan, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon where a model starts from nothing; AdamW, which pre-trained it most likely, to fine-tune."""
    if plan.source:
        small = sum(p.numel() for p in model.parameters()) < 50e6
        default = (5e-3 if small else 5e-4) if plan.lora else (2e-3 if small else 3e-5)
        return adamw(model, plan.rate or default)
    return muon_and_adamw(model, plan.rate or LEARNING_RATE[plan.package], plan.mixed)
