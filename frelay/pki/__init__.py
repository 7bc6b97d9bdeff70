"""Certificates and CRLs: a small certificate authority, and what ``frelay init`` writes with it.

Nothing here runs inside the relay. The relay only reads PEM files, so any other authority (SPIRE, cert-manager, that of
a company) works as well. With this one a first relay needs no other authority.
"""
