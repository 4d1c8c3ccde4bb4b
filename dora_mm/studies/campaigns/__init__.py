"""Campaigns: many trainings that compare methods, on pictures or on questions; they name no family of models."""
