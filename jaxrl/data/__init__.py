"""Datasets and replay: readers of file formats, one ring in device memory, sampling."""
