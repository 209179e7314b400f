"""The nouns of autofit: frozen structs, units in the names."""
