"""Draft methods that are trained, one file each; the file's name is the method's."""
