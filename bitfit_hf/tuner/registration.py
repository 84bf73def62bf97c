"""Making `BITFIT` one of PEFT's methods."""

from __future__ import annotations

import peft
from peft import PeftType, mapping

from ..config import BitFitConfig, BitFitPeftType
from ..errors import RegistrationError
from ..storage.keys import PREFIX
from .model import BitFitModel


def register() -> None:
    """Enters configuration, tuner and prefix into PEFT's mappings; doing so again is harmless.

    Raises:
        [`RegistrationError`]: This `peft` has a `BITFIT` of its own.
    """
    from .. import __version__

    name = BitFitPeftType.BITFIT
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if name.value in PeftType.__members__ or (known is not None and known is not BitFitConfig):
        raise RegistrationError(
            f"peft {peft.__version__} has a method BITFIT of its own ({known}), so bitfit_hf {__version__} cannot "
            "register the one it brings. Use one or the other: `pip uninstall bitfit-hf`, or an older peft."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = BitFitConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = BitFitModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = PREFIX  # type: ignore[index]
