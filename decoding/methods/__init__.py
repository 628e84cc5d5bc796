"""One file per decoding method; what they share is in `decoding.methods.step`."""

from decoding.methods.mmtad import MMTAD
from decoding.methods.mtad import MTAD
from decoding.methods.mtjd import MTJD
from decoding.methods.multi_candidate import MultiCandidate
from decoding.methods.speculative import Speculative
from decoding.methods.step import DecodeStep, Method
from decoding.methods.target import SingleModel

METHODS_BY_NAME: dict[str, Method] = {
    "target": SingleModel("target"),
    "draft": SingleModel("draft"),
    "speculative": Speculative(),
    "multi_candidate": MultiCandidate(),
    "mtjd": MTJD(),
    "mtad": MTAD(),
    "mmtad": MMTAD(),
}

__all__ = ["METHODS_BY_NAME", "DecodeStep", "Method"]
