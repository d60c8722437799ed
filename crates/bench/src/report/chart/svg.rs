//! Drawing: shapes into SVG text, scales, and the style that all charts have.

use std::fmt::Write;

/// Colours and strokes of charts, for light and dark, screens and paper. Series have the classes `s0` to `s7`.
pub const STYLE: &str = "\
svg.chart{font:12px system-ui,sans-serif;max-width:100%;height:auto}\
svg.chart text{fill:#1f2328}svg.chart .dim{fill:#59636e}svg.chart .head{font-weight:600;font-size:13px}\
svg.chart .grid{stroke:#d1d9e0;stroke-width:1}svg.chart .axis{stroke:#59636e;stroke-width:1}\
svg.chart .whisker{stroke:#1f2328;stroke-width:1.4;fill:none}svg.chart .curve{fill:none;stroke-width:2}\
svg.chart .one{stroke:#1f2328;stroke-width:1;stroke-dasharray:4 3}\
svg.chart .f0{fill:#0072b2}svg.chart .f1{fill:#d55e00}svg.chart .f2{fill:#009e73}svg.chart .f3{fill:#b0559b}\
svg.chart .f4{fill:#c98500}svg.chart .f5{fill:#3a9bd0}svg.chart .f6{fill:#7a5195}svg.chart .f7{fill:#7d7d7d}\
svg.chart .fkick{fill:#9fb3c8}svg.chart .freturn{fill:#c8b39f}\
svg.chart .s0{stroke:#0072b2}svg.chart .s1{stroke:#d55e00}svg.chart .s2{stroke:#009e73}svg.chart .s3{stroke:#b0559b}\
svg.chart .s4{stroke:#c98500}svg.chart .s5{stroke:#3a9bd0}svg.chart .s6{stroke:#7a5195}svg.chart .s7{stroke:#7d7d7d}\
@media screen and (prefers-color-scheme:dark){\
svg.chart text{fill:#e6edf3}svg.chart .dim{fill:#9198a1}svg.chart .grid{stroke:#3d444d}svg.chart .axis{stroke:#9198a1}\
svg.chart .whisker,svg.chart .one{stroke:#e6edf3}\
svg.chart .f0{fill:#4fa8e0}svg.chart .f1{fill:#f08a4b}svg.chart .f2{fill:#3cc49e}svg.chart .f3{fill:#e29cc4}\
svg.chart .f4{fill:#f2be4a}svg.chart .f5{fill:#8ccbf0}svg.chart .f6{fill:#b594d6}svg.chart .f7{fill:#b0b0b0}\
svg.chart .s0{stroke:#4fa8e0}svg.chart .s1{stroke:#f08a4b}svg.chart .s2{stroke:#3cc49e}svg.chart .s3{stroke:#e29cc4}\
svg.chart .s4{stroke:#f2be4a}svg.chart .s5{stroke:#8ccbf0}svg.chart .s6{stroke:#b594d6}svg.chart .s7{stroke:#b0b0b0}}";

/// Colours of series; further ones begin again.
pub const COLOURS: usize = 8;

/// Text that is no markup.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no place for these.
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Where text stands to its point.
#[derive(Clone, Copy, Debug)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// It is centred.
    Middle,
    /// It ends there.
    End,
}

/// A chart being drawn; units are CSS pixels.
#[derive(Debug, Default)]
pub struct Svg {
    body: String,
}

impl Svg {
    /// Text; `class` is `dim`, `head` or nothing.
    pub fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>",
            escape(text)
        );
    }

    /// A rectangle; `more` is further attributes, `title` what is shown over it.
    pub fn rect(&mut self, at: [f64; 4], class: &str, more: &str, title: &str) {
        let [x, y, width, height] = at;
        let (width, height) = (width.max(0.0), height.max(0.0));
        let _ = write!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" class=\"{class}\"{more}"
        );
        self.close("rect", title);
    }

    /// A line from one point to another.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let _ = write!(
            self.body,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" class=\"{class}\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    /// A curve through points.
    pub fn curve(&mut self, points: &[(f64, f64)], class: &str, title: &str) {
        let mut path = String::new();
        for (n, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{x:.1} {y:.1}", if n == 0 { "M" } else { "L" });
        }
        let _ = write!(self.body, "<path d=\"{path}\" class=\"curve {class}\"");
        self.close("path", title);
    }

    /// A dot; `more` is further attributes.
    pub fn dot(&mut self, (x, y): (f64, f64), class: &str, more: &str, title: &str) {
        let _ = write!(
            self.body,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\" class=\"{class}\"{more}"
        );
        self.close("circle", title);
    }

    /// A diamond.
    pub fn diamond(&mut self, (x, y): (f64, f64), title: &str) {
        let _ = write!(
            self.body,
            "<path d=\"M{x:.1} {:.1}l5 5l-5 5l-5 -5z\" class=\"whisker\"",
            y - 5.0
        );
        self.close("path", title);
    }

    fn close(&mut self, element: &str, title: &str) {
        if title.is_empty() {
            self.body.push_str("/>");
        } else {
            let _ = write!(self.body, "><title>{}</title></{element}>", escape(title));
        }
    }

    /// The whole: an `svg` element without its style.
    pub fn finish(self, width: f64, height: f64, label: &str) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{}\">{}</svg>\n",
            escape(label),
            self.body
        )
    }
}

/// A chart as a file of its own.
pub fn standalone(chart: &str) -> String {
    match chart.split_once('>') {
        Some((head, rest)) => format!("{head}><style>{STYLE}</style>{rest}"),
        None => chart.to_owned(),
    }
}

/// From values to places.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    log: bool,
}

impl Scale {
    /// From 0, or a number below it, to `most`.
    pub fn linear(most: f64, start: f64, end: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 {
            most
        } else {
            1.0
        };
        Self {
            from: 0.0,
            to: most,
            start,
            end,
            log: false,
        }
    }

    /// Logarithmic; both ends above 0.
    pub fn log(least: f64, most: f64, start: f64, end: f64) -> Self {
        let good = |value: f64| value.is_finite() && value > 0.0;
        let least = if good(least) { least } else { 1.0 };
        let most = if good(most) && most > least {
            most
        } else {
            least * 10.0
        };
        Self {
            from: least.ln(),
            to: most.ln(),
            start,
            end,
            log: true,
        }
    }

    /// The place of a value; those outside are at the ends.
    pub fn at(&self, value: f64) -> f64 {
        let value = match self.log {
            true => value.max(f64::MIN_POSITIVE).ln(),
            false => value,
        };
        let part = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        self.start + (self.end - self.start) * part
    }

    /// Round values along it.
    pub fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (least, most) = (self.from.exp(), self.to.exp());
            let decades = (most / least).log10();
            let steps: &[f64] = if decades > 3.0 {
                &[1.0]
            } else {
                &[1.0, 2.0, 5.0]
            };
            let first = least.log10().floor() as i32;
            let last = most.log10().ceil() as i32;
            return (first..=last)
                .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
                .filter(|tick| *tick >= least * 0.999 && *tick <= most * 1.001)
                .collect();
        }
        let step = 10f64.powf((self.to / 4.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|times| times * step)
            .into_iter()
            .find(|step| self.to / step <= 5.0)
            .unwrap_or(step);
        (0..=10)
            .map(|n| f64::from(n) * step)
            .take_while(|tick| *tick <= self.to * 1.001)
            .collect()
    }
}

/// A tick's label: three digits, thousands as k and M.
pub fn tick(value: f64) -> String {
    let short = |value: f64| {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match value.abs() {
        v if v >= 1e6 => format!("{} M", short(value / 1e6)),
        v if v >= 1e4 => format!("{} k", short(value / 1e3)),
        v if v > 0.0 && v < 0.01 => format!("{value:e}"),
        _ => short(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_is_escaped_and_no_control_character_stays() {
        assert_eq!(
            escape("a<b>&\"c\"\u{1b}"),
            "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}"
        );
        let mut svg = Svg::default();
        svg.text(1.0, 2.0, Anchor::End, "dim", "<script>");
        svg.rect([0.0, 0.0, -1.0, 5.0], "f0", "", "a & b");
        let chart = svg.finish(10.0, 20.0, "x\"y");
        assert!(
            !chart.contains("<script>") && chart.contains("a &amp; b"),
            "{chart}"
        );
        assert!(chart.contains("width=\"0.0\"") && chart.contains("x&quot;y"));
        let file = standalone(&chart);
        assert!(
            file.starts_with("<svg ") && file.contains("><style>svg.chart"),
            "{file}"
        );
    }

    #[test]
    fn scales_place_values_and_choose_round_ticks() {
        let scale = Scale::linear(200.0, 100.0, 300.0);
        assert_eq!(
            (scale.at(0.0), scale.at(100.0), scale.at(900.0)),
            (100.0, 200.0, 300.0)
        );
        assert_eq!(scale.ticks(), [0.0, 50.0, 100.0, 150.0, 200.0]);
        let scale = Scale::log(10.0, 1000.0, 0.0, 2.0);
        assert!((scale.at(100.0) - 1.0).abs() < 1e-9);
        assert_eq!(
            scale.ticks(),
            [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]
        );
        for bad in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
            assert!(Scale::linear(bad, 0.0, 1.0).at(0.5).is_finite());
            assert!(Scale::log(bad, bad, 0.0, 1.0).at(0.5).is_finite());
            assert!(!Scale::linear(bad, 0.0, 1.0).ticks().is_empty());
        }
        for (value, text) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (1500.0, "1500"),
            (25_000.0, "25 k"),
            (2.5e6, "2.5 M"),
        ] {
            assert_eq!(tick(value), text);
        }
    }
}
