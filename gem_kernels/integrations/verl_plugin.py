"""What verl loads by its entry-point group `verl.plugins`: importing it acts, if the user has named it.

verl loads every installed plugin unless told otherwise. This one waits until VERL_USE_EXTERNAL_PLUGINS names it: that
this package is installed changes nothing in verl. verl keeps a plugin's error to itself, so it is logged here.
"""

from __future__ import annotations

import logging
import os

NAME = "gem_kernels"

if NAME in (name.strip() for name in os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "").lower().split(",")):
    try:
        from gem_kernels.integrations import verl

        verl.use_gem_kernels()
        verl.register_sega()
    except Exception as error:
        logging.getLogger(__name__).error("the plugin %s is not in use: %s", NAME, error)
        raise
