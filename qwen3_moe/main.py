"""The command line: python -m qwen3_moe.main -p "What is a router?"

    arguments ──> config, tokenizer, model ──> ids of the question ──> generate ──> ids of the answer ──> text

The answer goes to standard output and nothing else does; what the model thinks, notes, progress and speed go
to standard error. Exit code 0, 2 for a user's mistake (one sentence says which), 130 after Ctrl-C. Flags, the search
for a checkpoint's folder, printing and typing are in engine/arguments.py, engine/terminal.py, engine/conversation.py.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from .engine import terminal

if __name__ == "__main__":  # importing torch takes seconds, and Ctrl-C should leave quietly then too
    terminal.start()

from .engine.arguments import Parser, find_checkpoint, find_question
from .engine.batch_file import answer_file
from .engine.conversation import Conversation, chat, chat_format
from .engine.expert_picture import Routing
from .engine.prepare import read_checkpoint
from .engine.terminal import note, progress
from .generate import generate
from .layers import KVCache
from .tokenizer import Tokenizer
from .weights import load_model

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
DEFAULT, EMBEDDED, DOWNLOAD = "Qwen3-30B-A3B", "Qwen3-MoE-Tiny", "bash scripts/download_qwen3_moe.sh"
DEFAULT_PROMPT = "What is a router?"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of all three packages (engine/arguments.py), and one of this package."""
    parser = Parser("a Qwen3-MoE checkpoint", DEFAULT, EMBEDDED, DEFAULT_PROMPT)
    parser.add_argument("--show-experts", action="store_true", help="at the end, a picture of which experts worked")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """From arguments to an answer. What can be refused is refused before the weights are loaded."""
    folder, notes = find_checkpoint(arguments.model, CHECKPOINTS, DEFAULT, EMBEDDED, DOWNLOAD)
    config, _ = read_checkpoint(folder)
    tokenizer = Tokenizer.from_checkpoint(folder, **chat_format(arguments))
    conversation = Conversation(arguments, folder, config, tokenizer)
    if arguments.batch is not None:
        return answer_file(conversation, notes)
    question = find_question(arguments)
    asked = DEFAULT_PROMPT if question is None else question
    prompt_ids = conversation.prompt_ids([{"role": "user", "content": asked}])

    device, dtype = conversation.find_device(prompt_ids)
    for text in (*notes, *conversation.notes()):
        note(f"note: {text}")
    model = load_model(folder, device, dtype, progress("loading tensor"), engine=not arguments.plain)

    def answer_ids(prompt_ids: list[int], max_new_tokens: int, cache: KVCache) -> Iterator[int]:
        return generate(model, prompt_ids, max_new_tokens=max_new_tokens, **conversation.sampling,
                        stop_ids=conversation.stop_ids, seed=arguments.seed, cache=cache, compiled=arguments.compile)

    conversation.begin(model, answer_ids)
    routing = Routing(model) if arguments.show_experts else None
    if question is None and not arguments.chat:
        note(f'asking "{DEFAULT_PROMPT}"; ask your own with -p, or converse with --chat')
    try:
        chat(conversation) if arguments.chat else conversation.answer(prompt_ids)
    finally:  # after Ctrl-C too
        if routing is not None:
            note(routing.picture())


def main(arguments: list[str] | None = None) -> int:
    """The program: what is typed after its name (None: sys.argv) -> the exit code."""
    return terminal.exit_code(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    terminal.program(main)
