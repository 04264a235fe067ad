"""The configuration tree: schema, files, search space and resolution."""
