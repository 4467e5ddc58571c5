"""Offline: captured keys and values -> a tree of clusters, and calibration on a probe."""
