"""Questions to databases: the schema, a grammar of SQL made of it, and queries in a process that can only read."""
