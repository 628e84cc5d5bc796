"""One file per decoding method; what they share is in `decoding.methods.step`."""

from decoding.methods.mmtad import MMTAD
from decoding.methods.mtad import MTAD
from decoding.methods.speculative import Speculative
from decoding.methods.step import DecodeStep, Method
from decoding.methods.target import SingleModel

METHODS_BY_NAME: dict[str, Method] = {
    "target": SingleModel("target"),
    "draft": SingleModel("draft"),
    "speculative": Speculative(),
    "mtad": MTAD(),
    "mmtad": MMTAD(),
}

__all__ = ["METHODS_BY_NAME", "DecodeStep", "Method"]
