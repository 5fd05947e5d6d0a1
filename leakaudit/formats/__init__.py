"""Readers and writers: files <-> `Update`."""
