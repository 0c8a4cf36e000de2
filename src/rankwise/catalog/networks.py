"""Methods that rebuild the network: called directly, they return the new one."""

from __future__ import annotations
