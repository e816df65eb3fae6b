"""Checks at run time what the names of tensors promise: ``logp_RS`` is float ``[R, S]``, see the legend in `uae.types`.

`check` compares the tensors of one record or call with their names, in which a letter has one size. `Watch` does so for
everything that goes into, and comes out of, the methods of the protocols.
"""

import re
from dataclasses import fields
from inspect import signature
from typing import get_args, get_type_hints

from beartype.door import die_if_unbearable
from jaxtyping import Float, Int64, jaxtyped
from torch import Tensor

SUFFIX = re.compile(r"_([A-Z0-9]+)$")
INTEGERS = {"tokens_NT", "id_B", "first_N", "ids_NL", "uncond_ids_NL", "mask_NL", "uncond_mask_NL"}  # everything else is float
LATENTS = {"start_N", "final_N", "mean_RS"}  # more dimensions follow
RETURNS = {  # what a method gives back: the name of a tensor, or the kind of record
    "prepare": "context", "sample": "actions", "logprobs": "logp_RS", "encode": "condition", "render": "images_NCHW",
    "pixels": "images_NCHW", "embed": "embedding_ND", "__call__": "rewards",
}  # fmt: skip
RECORDS = {"actions", "condition", "rewards"}  # share the letters of the record or call that they are part of
COUNTED = {"context": "B", "condition": "N", "texts": "N", "seeds": "N"}  # have a length instead of a shape


def annotation(name, sizes):
    """The jaxtyping annotation of a name. Letters whose size is known become digits, and C is the 3 of RGB."""
    shape = " ".join(str(sizes.get(letter, letter)) for letter in SUFFIX.search(name)[1].replace("CHW", "3HW"))
    if name == "actions_RS":
        return Int64[Tensor, shape] | Float[Tensor, f"{shape} ..."]  # image tokens or latents
    return (Int64 if name in INTEGERS else Float)[Tensor, f"{shape} ..." if name in LATENTS else shape]


def tensors(record):
    """Names and values of all tensors of a dataclass. Only a field that is declared so may be None."""
    declared = get_type_hints(type(record))
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if SUFFIX.search(name) and not (value is None and type(None) in get_args(declared[name])):
            yield name, value
        elif name in RECORDS:
            yield from tensors(value)
        elif name == "parts":  # of rewards
            yield from ((f"{part}_BG", part_BG) for part, part_BG in value.items())
        assert SUFFIX.search(name) or not isinstance(value, Tensor), f"no shape in the name of {type(record)}.{name}"


def check(named, sizes=()):
    """Raise BeartypeDoorHintViolation unless the tensors have the shapes and dtypes of their names.

    ``named`` holds pairs of name and tensor, ``sizes`` the letters whose size is known. Returns the sizes of all letters.
    """
    sizes, found = dict(sizes), dict(sizes)
    with jaxtyped("context"):
        for name, value in named:
            die_if_unbearable(value, annotation(name, sizes))
            found |= zip(SUFFIX.search(name)[1], value.shape, strict=False)
    return found


class Watch:
    """Checks calls. ``crossed`` has the sizes of the last call of every method, by names like "Captioner.sample"."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.crossed = monkeypatch, {}

    def watch(self, role, protocol):
        for name in RETURNS.keys() & set(dir(protocol)) - {"__call__"}:
            self.monkeypatch.setattr(role, name, self.checked(getattr(role, name), protocol, name))

    def checked(self, method, protocol, name):
        """The method, checked. The names of its arguments are those of the protocol."""

        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            bound = signature(getattr(protocol, name)).bind(protocol, *args, **kwargs)
            given = bound.arguments | {RETURNS[name]: result}
            named = [(key, value) for key, value in given.items() if SUFFIX.search(key)]
            named += [pair for key in RECORDS & given.keys() for pair in tensors(given[key])]
            lengths = {(COUNTED[key], len(given[key])) for key in COUNTED.keys() & given.keys()}
            assert len(lengths) == len(dict(lengths)), f"{protocol.__name__}.{name}: lengths {lengths} disagree"
            self.crossed[f"{protocol.__name__}.{name}"] = check(named, lengths)
            return result

        return call
