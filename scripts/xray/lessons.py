"""Where the lesson tells more about a panel: the README, the title of its section, and the file of the code."""

SAME = {"lens": ("The model", "model.py"), "attention": ("Attention", "layers.py"),
        "rope": ("Rotary position embedding", "layers.py"), "cache": ("The KV cache", "layers.py"),
        "choice": ("Generation", "generate.py")}
SECTIONS = {
    "qwen3": SAME | {"cost": ("What it costs", "layers.py")},
    "qwen3_moe": {panel: ("The dense transformer in two pages", file) for panel, (_, file) in SAME.items()} | {
        "experts": ("The router", "moe.py"), "cost": ("What it costs, and a model larger than memory", "moe.py")},
    "deepseek_v3": SAME | {"attention": ("Multi-head latent attention", "mla.py"),
                           "rope": ("YaRN, and the scale of the scores", "yarn.py"),
                           "experts": ("The router", "moe.py"), "cache": ("Absorption", "mla.py"),
                           "drafts": ("Speculative decoding", "speculative.py"),
                           "cost": ("What it costs, and a model larger than memory", "moe.py")}}


def lessons(package: str) -> dict[str, tuple[str, str, str]]:
    """Panel -> (README, section, file)."""
    return {panel: (f"{package}/README.md", section, f"{package}/{file}")
            for panel, (section, file) in SECTIONS[package].items()}
