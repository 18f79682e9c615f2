"""Locate-then-edit methods: ROME, MEMIT, EMMET and their kin."""
