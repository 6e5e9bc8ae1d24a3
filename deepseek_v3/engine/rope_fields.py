"""RoPE in config.json: rope_theta, and YaRN's numbers, from either format of the file.

The published files say `rope_theta` and `rope_scaling`; those that transformers 5 writes have both in one object,
`rope_parameters`. Where a file has both, they must agree.
"""

from .fields import Fields, short

HARMLESS = ("rope_type", "type", "rope_theta", "finetuned", "max_position_embeddings")
ONLY_1 = ("partial_rotary_factor", "extrapolation_factor")


def read_rope(fields: Fields, Yarn: type) -> dict[str, object]:
    """{"rope_theta": number, "rope_scaling": a Yarn or None}; ValueError for another kind of RoPE."""
    names = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    given = [read_rope_object(fields, name, Yarn) for name in names or ["rope_scaling"]]
    if given[0] != given[-1]:
        fields.refuse("rope_scaling", "rope_parameters is there too and says something else; put all of it into that")
    return given[0]


def read_rope_object(fields: Fields, name: str, Yarn: type) -> dict[str, object]:
    rope = fields.object(name)
    inside = fields.object("rope_parameters").get("rope_theta", fields.get("rope_theta"))
    theta = rope.number("rope_theta", inside)
    if theta <= 1:
        raise ValueError(f"{fields.path}: rope_theta is {theta}: expected more than 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        fields.refuse(name, f"rope type {short(kind)} is not known, only 'default' and 'yarn' are")
    return {"rope_theta": theta, "rope_scaling": read_yarn(fields, name, rope, Yarn) if kind == "yarn" else None}


def read_yarn(fields: Fields, name: str, rope: Fields, Yarn: type):
    """The numbers of an object of type "yarn", which are the fields of the dataclass Yarn in config.py."""
    known = Yarn.__dataclass_fields__
    for key in sorted(rope.values):
        if key in ONLY_1 and rope.get(key, 1) == 1:
            continue
        if key not in known and key not in HARMLESS:
            fields.refuse(name, f"{key!r} is not a field of YaRN that this package knows")
    if fields.get("partial_rotary_factor", 1) != 1:
        fields.refuse("partial_rotary_factor", "only 1.0 is known beside YaRN")
    if rope.get("factor") is None:
        raise ValueError(f"{fields.path}: {name} has type 'yarn' but no factor")
    if rope.get("attn_factor", 1) != 1 and rope.get("attention_factor") is not None:
        fields.refuse(name, "attn_factor and attention_factor are both there; leave out one")
    numbers = {key: rope.number(key, zero=key.startswith("mscale")) for key in known
               if key != "truncate" and rope.get(key) is not None}
    # A value at the top level overrides the one inside the object, as in transformers 5.
    original = "original_max_position_embeddings"
    where = rope if fields.get(original) is None else fields
    numbers[original] = where.integer(original, fields.integer("max_position_embeddings"))
    return Yarn(**numbers, truncate=rope.boolean("truncate", True))
