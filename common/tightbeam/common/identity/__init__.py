"""Who is who: identities, certificates, and the authority that issues them."""
