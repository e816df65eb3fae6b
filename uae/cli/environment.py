"""Environment variables in configurations, such as ``${oc.env:UAE_IMAGES,images}``. An empty one is an error.

``UAE_IMAGES=$DATA`` with a typo sets an empty variable, and an empty path would mean the working directory.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc


def variable(name: str, *default: Any) -> str | None:
    """The value of an environment variable, or a default where it is not set.

    Raises:
        ValueError: The variable is set, but empty.
        KeyError: It is not set, and there is no default.
    """
    if name in os.environ and not os.environ[name].strip():
        otherwise = f" (the configuration then takes {default[0]})" if default else ""
        raise ValueError(f"the environment variable {name} is empty: give it a value, or unset it{otherwise}")
    found: str | None = oc.env(name, *default)
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # omegaconf 2.4 has a new name for this function, which means something else in 2.3
    OmegaConf.register_new_resolver("oc.env", variable, replace=True)
