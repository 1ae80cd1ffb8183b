"""All kinds of faults."""

from __future__ import annotations

import kinds_data
import kinds_files
import kinds_options
import kinds_sources

KINDS = [*kinds_sources.KINDS, *kinds_options.KINDS, *kinds_files.KINDS, *kinds_data.KINDS]
assert len({kind.name for kind in KINDS}) == len(KINDS), "names of kinds must differ"
