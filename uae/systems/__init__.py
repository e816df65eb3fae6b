"""Named assemblies of a captioner, a conditioner and a renderer."""
