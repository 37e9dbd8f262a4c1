"""Readers of the public sets, in the file formats in which they are published."""
