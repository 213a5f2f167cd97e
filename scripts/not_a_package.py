"""The build backend of this project: there is nothing to install, and `pip install .` says so instead of doing it."""

import sys

REASON = (
    "claimbench is a folder of scripts, run from a checkout, not a package: "
    "`pip install -r requirements.txt` installs what they need, or `make demo` does it all"
)


def get_requires_for_build_wheel(config_settings=None):
    sys.exit(REASON)


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
build_wheel = build_editable = build_sdist = get_requires_for_build_wheel
