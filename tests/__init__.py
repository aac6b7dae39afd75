"""Tests of the pipeline (unit, integration) and of what it makes (gpu)."""
