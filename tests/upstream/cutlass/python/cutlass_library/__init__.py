# SPDX-License-Identifier: Apache-2.0
"""The names a kernel generator needs, and no others."""

from .library import *  # noqa: F403
