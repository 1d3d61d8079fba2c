"""The published tables: what every column means, how tables are written, and how they are assembled."""
