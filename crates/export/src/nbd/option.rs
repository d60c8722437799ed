//! What clients put into options (`doc/proto.md`, "Option types"). Nothing here
//! keeps state: bytes in, a checked value or `None` out.

use nbd::proto::{ALLOCATION, Fields, info};

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// The client asked for these.
    pub wants_name: bool,
    pub wants_description: bool,
    pub wants_block_size: bool,
}

impl<'a> InfoRequest<'a> {
    /// `None` when lengths do not add up to the option's length or the name is not UTF-8.
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let mut request = InfoRequest {
            name: fields.string()?,
            wants_name: false,
            wants_description: false,
            wants_block_size: false,
        };
        for _ in 0..fields.u16()? {
            match fields.u16()? {
                info::NAME => request.wants_name = true,
                info::DESCRIPTION => request.wants_description = true,
                info::BLOCK_SIZE => request.wants_block_size = true,
                // NBD_INFO_EXPORT is always sent; what we do not know is ignored.
                _ => {}
            }
        }
        fields.is_empty().then_some(request)
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// How many queries there are.
    pub queries: u32,
    /// One of them is `base:allocation`.
    pub allocation: bool,
    /// One of them is `base:`, the wildcard of listing.
    pub base: bool,
}

impl<'a> MetaRequest<'a> {
    /// `None` when lengths do not add up or a string is not UTF-8. Unknown namespaces and leaves are
    /// ignored, as the specification demands.
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let queries = fields.u32()?;
        let (mut allocation, mut base) = (false, false);
        // Each query takes four bytes at least, so the data bounds this loop.
        for _ in 0..queries {
            match fields.string()? {
                ALLOCATION => allocation = true,
                "base:" => base = true,
                _ => {}
            }
        }
        fields.is_empty().then_some(MetaRequest {
            name,
            queries,
            allocation,
            base,
        })
    }

    /// Whether the answer to a listing names `base:allocation`.
    pub(crate) fn lists_allocation(&self) -> bool {
        self.queries == 0 || self.allocation || self.base
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn info_data(name: &str, requests: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((requests.len() as u16).to_be_bytes());
        for request in requests {
            data.extend(request.to_be_bytes());
        }
        data
    }

    fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend((query.len() as u32).to_be_bytes());
            data.extend(query.as_bytes());
        }
        data
    }

    #[test]
    fn info_asks_for_what_it_lists() {
        let data = info_data("disk", &[0, 3, 77, 2]);
        let request = InfoRequest::parse(&data).unwrap();
        assert_eq!(request.name, "disk");
        assert!(request.wants_block_size && request.wants_description && !request.wants_name);
    }

    #[test]
    fn options_that_do_not_add_up_are_refused() {
        let info = info_data("disk", &[3]);
        let meta = meta_data("disk", &["base:allocation"]);
        for cut in 0..info.len() {
            assert_eq!(InfoRequest::parse(&info[..cut]), None, "{cut}");
        }
        for cut in 0..meta.len() {
            assert_eq!(MetaRequest::parse(&meta[..cut]), None, "{cut}");
        }
        assert_eq!(InfoRequest::parse(&[&info[..], &[0]].concat()), None);
        assert_eq!(MetaRequest::parse(&[&meta[..], &[0]].concat()), None);
        let mut long = info_data(&"x".repeat(4097), &[]);
        assert_eq!(InfoRequest::parse(&long), None);
        long = info_data(&"x".repeat(4096), &[]);
        assert!(InfoRequest::parse(&long).is_some());
        assert_eq!(
            InfoRequest::parse(&info_data("\u{fffd}", &[])[..6]),
            None,
            "a cut character"
        );
        // A count that promises four billion queries ends with the data.
        let mut many = meta_data("", &[]);
        many[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(MetaRequest::parse(&many), None);
    }

    #[test]
    fn queries_select_base_allocation_only() {
        for (queries, allocation, lists) in [
            (&[][..], false, true),
            (&["base:"], false, true),
            (&["base:allocation"], true, true),
            (&["qemu:dirty-bitmap:x"], false, false),
            (&["base:other", "base:allocation"], true, true),
            (&["nocolon"], false, false),
        ] {
            let data = meta_data("", queries);
            let request = MetaRequest::parse(&data).unwrap();
            assert_eq!(request.allocation, allocation, "{queries:?}");
            assert_eq!(request.lists_allocation(), lists, "{queries:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::parse(&data);
            let _ = MetaRequest::parse(&data);
        }

        #[test]
        fn what_is_well_formed_is_understood(name in "[a-z]{0,20}", wants in proptest::collection::vec(0u16..9, 0..9)) {
            let data = info_data(&name, &wants);
            let request = InfoRequest::parse(&data).unwrap();
            prop_assert_eq!(request.name, name.as_str());
            prop_assert_eq!(request.wants_name, wants.contains(&1));
            prop_assert_eq!(request.wants_block_size, wants.contains(&3));
        }
    }
}
