"""Weights from files and downloads, read without running code."""
