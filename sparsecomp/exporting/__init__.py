"""Export: whole models as packages of C, objects and weights for a board; `sparsecomp.export`."""
