"""Model families as graphs: one file per family, one per block that families share."""
