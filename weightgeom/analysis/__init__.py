"""Analysis: tables in, tables and claims out."""
