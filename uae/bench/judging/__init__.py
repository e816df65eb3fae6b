"""Language models as judges: what they are asked, asking them once and no more, and what their answers say."""
