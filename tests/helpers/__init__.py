"""What several test modules, or processes that they start, use."""
