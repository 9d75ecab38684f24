"""What every room uses: whole-or-absent files, forks, threads, read-ahead, progress, devices, failpoints."""
