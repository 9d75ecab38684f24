"""Ground that every room stands on: whole-or-absent files, forks, threads, read-ahead, devices, failpoints."""
