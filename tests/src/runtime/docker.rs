//! Docker Engines on the hosts of a lab, each with the ovl plugin.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};

use anyhow::{Context as _, Result};
use netns_lab::{Engine, Host};

use super::CommandTarget;
use super::image::{self, IMAGE};

/// A Docker Engine that has loaded the test image.
#[derive(Debug)]
pub struct Docker(Engine);

impl Docker {
    /// Starts an Engine and loads the image.
    pub fn start(host: &Host, options: &[&str]) -> Result<Self> {
        let engine = Engine::start(host, options)?;
        let dir = host.dir().join("docker-image");
        std::fs::create_dir_all(&dir)?;
        let archive = image::make(&dir)?;
        engine.call(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        Ok(Docker(engine))
    }

    /// Starts a container of the image, with further arguments of `docker run`.
    pub fn run(&self, name: &str, more: &[&str]) -> Result<DockerContainer<'_>> {
        // Nothing in the container handles SIGTERM, so a graceful stop would only wait for its timeout.
        let own = ["run", "--detach", "--name", name, "--stop-signal", "SIGKILL"];
        self.call(&[&own, more, &[IMAGE]].concat())?;
        Ok(self.container(name))
    }

    /// Returns a handle to an existing container.
    pub fn container(&self, name: &str) -> DockerContainer<'_> {
        DockerContainer { engine: &self.0, name: name.to_owned() }
    }
}

impl Deref for Docker {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.0
    }
}

impl DerefMut for Docker {
    fn deref_mut(&mut self) -> &mut Engine {
        &mut self.0
    }
}

/// A running container.
#[derive(Debug)]
pub struct DockerContainer<'engine> {
    engine: &'engine Engine,
    name: String,
}

impl DockerContainer<'_> {
    /// The address that the Engine reports for it on a network.
    pub fn reported_address(&self, network: &str) -> Result<IpAddr> {
        let told = self.engine.inspect("container", &self.name)?;
        let text = told["NetworkSettings"]["Networks"][network]["IPAddress"].as_str().unwrap_or_default();
        text.parse().with_context(|| format!("{text:?} is not an address of {}", self.called()))
    }
}

impl CommandTarget for DockerContainer<'_> {
    fn called(&self) -> String {
        format!("container {} on {}", self.name, self.engine.host().name())
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.engine.call(&[&["exec", &self.name], words].concat())
    }
}
