"""Members of a comparison on the same cases: what must agree, paired tests, rankings, the report."""
