//! What could not be measured: a reason of many is said once.

use crate::record::Failure;

/// A cell, and its sides.
type Sides<'a> = (&'a str, Vec<&'a str>);

/// Each reason, in the order in which they came first, with whom it kept from being measured: "read-4k, qsd; read-8k, qsd and diskplane".
pub(super) fn reasons(failures: &[Failure]) -> Vec<(&str, String)> {
    let mut reasons: Vec<(&str, Vec<Sides<'_>>)> = Vec::new();
    for failure in failures {
        let known = reasons.iter().position(|(why, _)| *why == failure.why);
        let at = known.unwrap_or_else(|| {
            reasons.push((&failure.why, Vec::new()));
            reasons.len() - 1
        });
        let cells = &mut reasons[at].1;
        match cells.iter_mut().find(|(cell, _)| *cell == failure.cell) {
            Some((_, sides)) if sides.contains(&&failure.side[..]) => {}
            Some((_, sides)) => sides.push(&failure.side),
            None => cells.push((&failure.cell, vec![&failure.side])),
        }
    }
    let who = |cells: Vec<Sides<'_>>| {
        let cells = cells.iter();
        let each = cells.map(|(cell, sides)| match &sides[..] {
            [] | [_] | [_, _] => format!("{cell}, {}", sides.join(" and ")),
            [first, others @ ..] => format!("{cell}, {first} and {} others", others.len()),
        });
        each.collect::<Vec<_>>().join("; ")
    };
    let reasons = reasons.into_iter();
    reasons.map(|(why, cells)| (why, who(cells))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_many_is_said_once() {
        let failed = |cell: &str, side: &str, why: &str| Failure {
            cell: cell.to_owned(),
            side: side.to_owned(),
            why: why.to_owned(),
        };
        let all = [
            failed("a", "qsd", "no room"),
            failed("a", "nbdkit", "not installed"),
            failed("a", "qsd", "no room"),
            failed("b", "qsd", "no room"),
            failed("b", "diskplane", "no room"),
            failed("c", "x", "no room"),
            failed("c", "y", "no room"),
            failed("c", "z", "no room"),
        ];
        let who = "a, qsd; b, qsd and diskplane; c, x and 2 others".to_owned();
        assert_eq!(
            reasons(&all),
            [("no room", who), ("not installed", "a, nbdkit".to_owned())]
        );
    }
}
