"""Losses, class weights and the teacher of a distillation."""
