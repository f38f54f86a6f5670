"""The viewer of a page: a case's volumes made small, and NiiVue with what drives it, all inside the page."""
