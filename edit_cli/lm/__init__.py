"""Language models behind one façade."""
