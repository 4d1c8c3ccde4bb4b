"""Campaigns: many trainings that compare methods, on images or on questions; they name no family of models."""
