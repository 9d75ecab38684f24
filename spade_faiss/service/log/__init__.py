"""What the service never forgets: `database` is its file, `inspections` and `changes` of the normal set are tables."""
