"""Data sets that are there on any machine: real digits, speech and text without a download."""

from __future__ import annotations

EMBEDDED = {"digits": "image", "speech": "audio", "text": "text"}
"""name -> modality"""
