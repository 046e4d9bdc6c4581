//! A real browser in the namespace of a host: Debian's Chromium, driven by chromedriver over WebDriver (W3C), with curl.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use netns_lab::{Host, Spawned, wait_until};
use serde_json::{Value, json};

/// Time in which a page shows something.
const SHOWN: Duration = Duration::from_secs(15);

/// A browser. It ends when it is dropped.
pub struct Browser<'a> {
    host: &'a Host,
    session: String,
    _driver: Spawned,
}

impl<'a> Browser<'a> {
    /// Starts a browser.
    ///
    /// # Errors
    ///
    /// There is no chromedriver (Debian's package `chromium-driver`), or it cannot start a browser.
    pub fn start(host: &'a Host) -> Result<Self> {
        let driver = host.spawn(["chromedriver", "--port=9515"]).context("is chromium-driver installed?")?;
        let mut browser = Self { host, session: String::new(), _driver: driver };
        wait_until(SHOWN, "chromedriver", || browser.call("GET", "/status", None).map(drop))?;
        let profile = host.dir().join("browser");
        // Its sandbox cannot be used by root.
        let options = json!({
            "binary": "/usr/bin/chromium",
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,800",
                format!("--user-data-dir={}", profile.display()),
            ],
        });
        let wanted = json!({ "browserName": "chrome", "goog:chromeOptions": options });
        let started =
            browser.call("POST", "/session", Some(json!({ "capabilities": { "alwaysMatch": wanted } })))?;
        let session = started["sessionId"].as_str().context("no session")?;
        browser.session = format!("/session/{session}");
        Ok(browser)
    }

    /// Calls chromedriver, and returns the value of its answer.
    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let url = format!("http://127.0.0.1:9515{}{path}", self.session);
        let text = body.map(|body| body.to_string());
        let mut arguments = vec!["curl", "-sS", "--max-time", "25", "-X", method, &url];
        if text.is_some() {
            arguments.extend(["-H", "Content-Type: application/json", "--data-binary", "@-"]);
        }
        let answer: Value = serde_json::from_str(&self.host.exec_input(arguments, text.as_deref())?)?;
        if let Some(error) = answer["value"]["error"].as_str() {
            bail!("{method} {path}: {error}: {}", answer["value"]["message"]);
        }
        Ok(answer["value"].clone())
    }

    /// Opens a page. Returns when it has loaded.
    pub fn open(&self, url: &str) -> Result<()> {
        // A change of the fragment alone would load nothing.
        self.call("POST", "/url", Some(json!({ "url": "about:blank" })))?;
        self.call("POST", "/url", Some(json!({ "url": url }))).map(drop)
    }

    /// Returns the value of an expression of JavaScript. The page's Content-Security-Policy does not hold for it.
    pub fn value(&self, expression: &str) -> Result<Value> {
        self.call(
            "POST",
            "/execute/sync",
            Some(json!({ "script": format!("return {expression}"), "args": [] })),
        )
    }

    /// Waits until an expression has a value.
    pub fn wait_value(&self, expression: &str, expected: &Value) -> Result<()> {
        wait_until(SHOWN, &format!("{expression} to be {expected}"), || {
            let value = self.value(expression)?;
            anyhow::ensure!(value == *expected, "{value}");
            Ok(())
        })
    }

    /// Waits until the text of the elements that a selector matches contains all parts.
    pub fn wait_text(&self, selector: &str, parts: &[&str]) -> Result<()> {
        let expression =
            format!("[...document.querySelectorAll({selector:?})].map(e => e.innerText).join(' ')");
        wait_until(SHOWN, &format!("{parts:?} in {selector}"), || {
            let text = self.value(&expression)?;
            let text = text.as_str().unwrap_or_default();
            anyhow::ensure!(parts.iter().all(|part| text.contains(part)), "{text}");
            Ok(())
        })
    }

    /// Presses keys, one after the other. Special ones have the code points of WebDriver, section 17.4.2.
    pub fn press(&self, keys: &str) -> Result<()> {
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                ["keyDown", "keyUp"].map(|action| json!({ "type": action, "value": key.to_string() }))
            })
            .collect();
        let all = json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] });
        self.call("POST", "/actions", Some(all)).map(drop)
    }

    /// Calls a method of Chromium's DevTools protocol.
    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        self.call("POST", "/goog/cdp/execute", Some(json!({ "cmd": command, "params": parameters })))
    }

    /// Returns a picture of the page, as a PNG in base64.
    pub fn screenshot(&self) -> Result<String> {
        let picture = self.call("GET", "/screenshot", None)?;
        Ok(picture.as_str().context("no picture")?.to_owned())
    }
}

impl Drop for Browser<'_> {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // Otherwise the browser would outlive chromedriver.
            let _ = self.call("DELETE", "", None);
        }
    }
}
